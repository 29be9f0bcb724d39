"""The named data sets: MNIST as embedded, made-up files of the others, and the real ones where a machine has them."""

from __future__ import annotations

import gzip
import hashlib
import io
import lzma
import os
import struct
import tarfile
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.io import savemat

from ppl_vae import data
from ppl_vae.data import DATASETS, binary_sets, image_sets

WORDS = {"train": "train", "validation": "valid", "test": "test"}


@pytest.mark.parametrize("word", DATASETS)
def test_every_data_set_of_the_command_line_has_a_reader(word):
    assert callable(DATASETS[word].import_reader())


# --- MNIST ---


def raw_mnist(name: str) -> bytes:
    return lzma.decompress((files("ppl_vae") / "mnist" / f"{name}.xz").read_bytes())


@pytest.fixture(scope="module")
def mnist() -> data.Splits:
    return data.load("mnist")


@pytest.fixture(scope="module")
def idx() -> SimpleNamespace:
    """MNIST by a second reading of the IDX format: a header of 16 or 8 bytes, then the pixels or the labels."""

    def read(name: str, length: int) -> np.ndarray:
        return np.frombuffer(raw_mnist(name), np.uint8)[length:]

    images = {name: read(f"{name}-images-idx3-ubyte", 16).reshape(-1, 1, 28, 28) for name in ("train", "t10k")}
    labels = {name: read(f"{name}-labels-idx1-ubyte", 8) for name in ("train", "t10k")}
    return SimpleNamespace(
        train=images["train"], test=images["t10k"], train_labels=labels["train"], test_labels=labels["t10k"]
    )


def test_mnist_is_the_published_files_with_the_last_10000_training_images_as_validation(mnist, idx):
    assert (mnist.kind, mnist.event_shape, mnist.train.dtype) == ("8-bit levels", (1, 28, 28), torch.uint8)
    expected = {
        "train": (idx.train[:50_000], idx.train_labels[:50_000]),
        "validation": (idx.train[50_000:], idx.train_labels[50_000:]),
        "test": (idx.test, idx.test_labels),
    }
    for split, (images, labels) in expected.items():
        np.testing.assert_array_equal(getattr(mnist, split).numpy(), images)
        np.testing.assert_array_equal(mnist.labels[split].numpy(), labels)


@pytest.mark.thorough
def test_the_checksum_of_mnist_is_that_of_its_two_published_image_files(mnist):
    """Run folders hold it."""
    published = (hashlib.sha256(raw_mnist(f"{name}-images-idx3-ubyte")).hexdigest() for name in ("train", "t10k"))
    assert mnist.sha256 == hashlib.sha256("".join(published).encode()).hexdigest()


def flip(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def flip_within(name: str, at: int) -> bytes:
    return lzma.compress(flip(raw_mnist(name), at), preset=0)


TRAIN_IMAGES = (files("ppl_vae") / "mnist" / "train-images-idx3-ubyte.xz").read_bytes()
DAMAGES = {
    "a pixel": ("t10k-images-idx3-ubyte", lambda: flip_within("t10k-images-idx3-ubyte", 500_000), "checksum is not"),
    "a label": ("t10k-labels-idx1-ubyte", lambda: flip_within("t10k-labels-idx1-ubyte", 500), "checksum is not"),
    "a byte of the archive": ("train-images-idx3-ubyte", lambda: flip(TRAIN_IMAGES, 100_000), "cannot be read"),
    "missing": ("train-images-idx3-ubyte", lambda: None, "cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_embedded_file_is_refused(monkeypatch, tmp_path, damage):
    name, make, message = DAMAGES[damage]
    (tmp_path / "mnist").mkdir()
    for genuine in (path for path in (files("ppl_vae") / "mnist").iterdir() if path.name.endswith(".xz")):
        content = make() if genuine.name == f"{name}.xz" else genuine.read_bytes()
        if content is not None:
            (tmp_path / "mnist" / genuine.name).write_bytes(content)
    monkeypatch.setattr(image_sets, "files", lambda package: tmp_path)
    with pytest.raises(ValueError, match=f"{name}.xz: .*{message}.*install the package again"):
        data.load("mnist")


# --- Made-up files of the sets that are downloaded ---

NUM_TRAIN, NUM_TEST = 11_000, 20


def gray(count: int) -> np.ndarray:
    """(N, 28, 28): each image is its number."""
    return np.broadcast_to((np.arange(count) % 251).astype(np.uint8)[:, None, None], (count, 28, 28))


def red(count: int) -> np.ndarray:
    """(N, 3, 32, 32): red, with the number of each image at row 3 and column 5."""
    pixels = np.zeros((count, 3, 32, 32), np.uint8)
    pixels[:, 0, 3, 5] = np.arange(count) % 251
    return pixels


def labels_of(count: int) -> np.ndarray:
    return (np.arange(count) % 10).astype(np.uint8)


def encode_idx(array: np.ndarray) -> bytes:
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return gzip.compress(header + np.ascontiguousarray(array).tobytes(), 1)


def encode_mat(count: int) -> bytes:
    """As SVHN: (32, 32, 3, N), and labels from 1 to 10."""
    labels = labels_of(count)
    stored = io.BytesIO()
    savemat(stored, {"X": red(count).transpose(2, 3, 1, 0), "y": np.where(labels == 0, 10, labels)[:, None]})
    return stored.getvalue()


def encode_cifar10() -> bytes:
    rows = np.concatenate([labels_of(NUM_TRAIN)[:, None], red(NUM_TRAIN).reshape(NUM_TRAIN, -1)], 1)
    batches = {f"data_batch_{i + 1}.bin": part.tobytes() for i, part in enumerate(np.split(rows, 5))}
    batches["test_batch.bin"] = rows[:NUM_TEST].tobytes()
    stored = io.BytesIO()
    with tarfile.open(fileobj=stored, mode="w:gz", compresslevel=1) as archive:
        for name, content in {"../outside": b"no", **batches}.items():
            member = tarfile.TarInfo(name if name.startswith("..") else f"cifar-10-batches-bin/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return stored.getvalue()


def encode_gray_set() -> list[bytes]:
    arrays = (gray(NUM_TRAIN), gray(NUM_TEST), labels_of(NUM_TRAIN), labels_of(NUM_TEST))
    return [encode_idx(array) for array in arrays]


SETS = {  # event shape, number of validation images, the variable with the files, and their made-up content
    "fashion-mnist": ((1, 28, 28), 10_000, "_FASHION_MNIST", encode_gray_set),
    "kmnist": ((1, 28, 28), 10_000, "_KMNIST", encode_gray_set),
    "cifar10": ((3, 32, 32), 5_000, "_CIFAR10", lambda: [encode_cifar10()]),
    "svhn": ((3, 32, 32), 7_325, "_SVHN", lambda: [encode_mat(NUM_TRAIN), encode_mat(NUM_TEST)]),
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The made-up files of each set behind addresses on this machine, with their checksums in the table's form."""
    folder, tables = tmp_path_factory.mktemp("served"), {}
    for name, (_, _, variable, make) in SETS.items():
        genuine = getattr(image_sets, variable)
        is_single = isinstance(genuine, image_sets.PublishedFile)
        changed = []
        for i, (file, content) in enumerate(zip([genuine] if is_single else genuine, make(), strict=True)):
            (folder / f"{name}-{i}").write_bytes(content)
            md5 = hashlib.md5(content).hexdigest()
            changed.append(file._replace(url=(folder / f"{name}-{i}").as_uri(), md5=md5))
        tables[variable] = changed[0] if is_single else tuple(changed)
    return tables


@pytest.fixture
def made_up_files(served: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, table in served.items():
        monkeypatch.setattr(image_sets, variable, table)


@pytest.mark.usefixtures("made_up_files")
@pytest.mark.parametrize("name", SETS)
def test_each_set_is_downloaded_once_and_split_as_published(tmp_path, name):
    event_shape, num_validation, variable, _ = SETS[name]
    read = data.load(name, data_dir=str(tmp_path))
    read = data.load(name, data_dir=str(tmp_path), download=False)
    assert (read.kind, read.event_shape, read.train.dtype) == ("8-bit levels", event_shape, torch.uint8)
    first = NUM_TRAIN - num_validation
    pixels, test_pixels = (
        (gray(count)[:, None] if event_shape[0] == 1 else red(count)) for count in (NUM_TRAIN, NUM_TEST)
    )
    for split, images, labels in (
        ("train", pixels[:first], labels_of(NUM_TRAIN)[:first]),
        ("validation", pixels[first:], labels_of(NUM_TRAIN)[first:]),
        ("test", test_pixels, labels_of(NUM_TEST)),
    ):
        np.testing.assert_array_equal(getattr(read, split).numpy(), images)
        assert read.labels[split].tolist() == labels.tolist()
    assert len(read.class_names) == 10
    table = getattr(image_sets, variable)
    expected = {table.path} if isinstance(table, image_sets.PublishedFile) else {file.path for file in table}
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert found == expected  # nothing is unpacked


@pytest.mark.usefixtures("made_up_files")
@pytest.mark.parametrize("name", ["fashion-mnist", "kmnist"])
def test_gray_sets_take_the_iwae_protocol(tmp_path, name):
    read = data.load(name, data_dir=str(tmp_path), protocol="iwae")
    assert [len(x) for x in (read.train, read.validation, read.test)] == [NUM_TRAIN, 0, NUM_TEST]


@pytest.mark.usefixtures("made_up_files")
@pytest.mark.parametrize(
    ("given", "environment", "expected"),
    [("given", "environment", "given"), (None, "environment", "environment"), (None, None, "data")],
)
def test_the_data_folder_is_the_one_given_else_the_environments_else_data(
    monkeypatch, tmp_path, given, environment, expected
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PPL_VAE_DATA_DIR", raising=False)
    if environment:
        monkeypatch.setenv("PPL_VAE_DATA_DIR", environment)
    data.load("kmnist", data_dir=given)
    assert [path.name for path in tmp_path.iterdir()] == [expected]


@pytest.mark.usefixtures("made_up_files")
@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("damage", ["truncated", "another file"])
def test_a_file_with_another_checksum_is_not_opened(tmp_path, name, damage):
    data.load(name, data_dir=str(tmp_path))
    path = next(path for path in tmp_path.rglob("*") if path.is_file())
    path.write_bytes(path.read_bytes()[:-1] if damage == "truncated" else b"another file")
    message = f"{name}: the checksum of {path} is not that of the published file; delete it, and fetch"
    with pytest.raises(ValueError, match=message):
        data.load(name, data_dir=str(tmp_path))


# --- Made-up files of the binary sets ---

BITS = {split: np.random.default_rng(i).integers(0, 2, (12 + i, 28, 28), np.uint8) for i, split in enumerate(WORDS)}
LABELS = {split: np.arange(len(bits), dtype=np.uint8) % 3 + 1 for split, bits in BITS.items()}  # from 1 on
CLASSES = ("ant", "bee", "cat")


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checksums of the made-up pixels in the place of the published ones."""
    checksums = {split: hashlib.sha256(bits.tobytes()).hexdigest() for split, bits in BITS.items()}
    monkeypatch.setattr(binary_sets, "_STATIC_MNIST_SHA256", checksums)
    monkeypatch.setattr(binary_sets, "_CALTECH_SHA256", checksums)


def write_amat(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for split, word in WORDS.items():
        lines = (" ".join(map(str, image.flatten())) for image in BITS[split])
        (folder / f"binarized_mnist_{word}.amat").write_text("\n".join(lines) + "\n")


def write_static_npz(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    packed = {word: np.packbits(BITS[split].reshape(-1, 784), axis=1) for split, word in WORDS.items()}
    np.savez(folder / "static_mnist.npz", **packed)


def write_mat(folder: Path) -> None:
    """MATLAB keeps an image down its columns."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {"classnames": np.array([*CLASSES], dtype=object)[None]}
    for split, word in {**WORDS, "validation": "val"}.items():
        arrays[f"{word}_data"] = np.stack([image.flatten(order="F") for image in BITS[split]])
        arrays[f"{word}_labels"] = LABELS[split][:, None]
    savemat(folder / "caltech101_silhouettes_28_split1.mat", arrays)


def trust_mat(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checksum of a made-up file in the place of the published one's."""
    for path in folder.rglob("*.mat"):
        monkeypatch.setattr(binary_sets, "_CALTECH_MAT_MD5", hashlib.md5(path.read_bytes()).hexdigest())


def write_caltech_npz(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {f"{word}_images": BITS[split] for split, word in WORDS.items()}
    arrays |= {f"{word}_labels": LABELS[split] for split, word in WORDS.items()}
    np.savez(folder / "caltech101_silhouettes.npz", **arrays, classnames=np.array(CLASSES))


FILES = {
    "static-mnist .amat": ("static-mnist", "static_mnist", write_amat),
    "static-mnist .npz": ("static-mnist", "static_mnist", write_static_npz),
    "caltech .mat": ("caltech-silhouettes", "caltech101_silhouettes", write_mat),
    "caltech .npz": ("caltech-silhouettes", "caltech101_silhouettes", write_caltech_npz),
}


@pytest.mark.parametrize("nested", [False, True], ids=["in the folder itself", "in its subfolder"])
@pytest.mark.parametrize("kind", FILES)
def test_each_file_of_a_binary_set_gives_its_pixels(made_up, monkeypatch, tmp_path, kind, nested):
    name, subfolder, write = FILES[kind]
    write(tmp_path / subfolder if nested else tmp_path)
    trust_mat(tmp_path, monkeypatch)
    read = data.load(name, data_dir=str(tmp_path))
    assert (read.kind, read.event_shape) == ("binary", (1, 28, 28))
    for split, bits in BITS.items():
        np.testing.assert_array_equal(getattr(read, split)[:, 0].numpy(), bits)
    has_labels = name == "caltech-silhouettes"
    assert read.class_names == (CLASSES if has_labels else ())
    for split, labels in read.labels.items():
        assert labels.tolist() == [i % 3 for i in range(len(BITS[split]))]  # from 0 on
    assert len(read.labels) == 3 * has_labels


@pytest.mark.parametrize("kind", FILES)
def test_other_pixels_than_the_published_ones_are_refused(monkeypatch, tmp_path, kind):
    name, _, write = FILES[kind]
    write(tmp_path)
    trust_mat(tmp_path, monkeypatch)
    with pytest.raises(ValueError, match=f"the checksum of train is not that of {name}; fetch the file again"):
        data.load(name, data_dir=str(tmp_path))


@pytest.mark.parametrize("kind", FILES)
def test_a_truncated_file_is_refused(made_up, tmp_path, kind):
    name, _, write = FILES[kind]
    write(tmp_path)
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    message = r"not a readable array file|expected lines of 784 zeros and ones|checksum"
    with pytest.raises(ValueError, match=message) as refused:
        data.load(name, data_dir=str(tmp_path))
    assert "\n" not in str(refused.value)


# --- The real files, where a machine has them ---


def real(file: str) -> Path:
    """The data folder that has this file; skips, visibly, where there is none."""
    folder = Path(os.environ.get("PPL_VAE_DATA_DIR", "data"))
    if not (folder / file).exists():
        pytest.skip(f"needs {file} in the folder that PPL_VAE_DATA_DIR names")
    return folder


STATIC, CALTECH = "static_mnist/static_mnist.npz", "caltech101_silhouettes/caltech101_silhouettes.npz"


def load_real(name: str, file: str) -> data.Splits:
    return data.load(name, data_dir=str(real(file)), download=False)


def test_static_mnist_has_its_published_sizes_and_score():
    """Test log-likelihood of independent pixels at the training rates (Laplace + 1): -205.79 nats."""
    read = load_real("static-mnist", STATIC)
    assert [tuple(x.shape) for x in (read.train, read.validation, read.test)] == [
        (count, 1, 28, 28) for count in (50_000, 10_000, 10_000)
    ]
    train, test = (x.flatten(1).numpy() for x in (read.train, read.test))
    rates = (train.sum(0, dtype=np.int64) + 1) / (len(train) + 2)
    white = test.mean(0, dtype=np.float64)
    assert (white @ np.log(rates) + (1 - white) @ np.log(1 - rates)).item() == pytest.approx(-205.79, abs=0.005)


def test_silhouettes_have_their_published_sizes_and_are_upright_in_a_background_of_ones():
    """Airplanes from the side are wider than high: more columns than rows hold the object."""
    read = load_real("caltech-silhouettes", CALTECH)
    assert [len(x) for x in (read.train, read.validation, read.test)] == [4_100, 2_264, 2_307]
    assert (len(read.class_names), read.class_names[0]) == (101, "Airplanes Side 2")
    stored = np.load(real(CALTECH) / CALTECH, allow_pickle=False)
    np.testing.assert_array_equal(read.test[:, 0].numpy(), stored["test_images"])
    assert read.train[:, 0, ::27, ::27].float().mean() > 0.95
    middle = (read.train[read.labels["train"] == 0, 0] == 0).float().mean(0)
    assert (middle.mean(0) > 0.2).sum() > (middle.mean(1) > 0.2).sum()
