"""Data: the named sets that are not embedded, by made-up files, and by the real ones where they are."""

from __future__ import annotations

import gzip
import hashlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.io import savemat

from ppl_vae import data
from ppl_vae.data import binary_sets, cifar10, torchvision_sets
from ppl_vae.data.registry import DATASETS

WORDS = {"train": "train", "validation": "valid", "test": "test"}


@pytest.mark.parametrize("word", DATASETS)
def test_every_data_set_of_the_command_line_has_a_reader(word: str) -> None:
    assert callable(DATASETS[word].load(word))


# --- torchvision, in the shapes that it gives ---

NUM_TRAIN, NUM_TEST = 11_000, 20


class Grays:
    """As FashionMNIST and KMNIST: tensors (N, H, W) and (N,)."""

    def __init__(self, root: str, train: bool = True, download: bool = False) -> None:
        count = NUM_TRAIN if train else NUM_TEST
        self.targets = torch.arange(count) % 10
        self.data = (torch.arange(count) % 251).to(torch.uint8)[:, None, None].repeat(1, 28, 28)


def colors(count: int) -> cifar10.Part:
    """As CIFAR-10: red, at row 3 and column 5."""
    pixels = np.zeros((count, 3, 32, 32), np.uint8)
    pixels[:, 0, 3, 5] = np.arange(count) % 251
    return cifar10.Part(pixels, np.arange(count) % 10)


class Numbers:
    """As SVHN: arrays (N, 3, H, W) and (N,)."""

    def __init__(self, root: str, split: str = "train", download: bool = False) -> None:
        count = NUM_TRAIN if split == "train" else NUM_TEST
        self.labels = np.arange(count) % 10
        self.data = np.zeros((count, 3, 32, 32), np.uint8)
        self.data[:, 0, 3, 5] = np.arange(count) % 251


def install(monkeypatch: pytest.MonkeyPatch, **classes: Any) -> None:
    """A torchvision of these classes."""
    module, datasets = ModuleType("torchvision"), ModuleType("torchvision.datasets")
    vars(datasets).update(classes)
    module.datasets = datasets  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision", module)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", datasets)


@pytest.fixture
def torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FashionMNIST=Grays, KMNIST=Grays, SVHN=Numbers)
    monkeypatch.setattr(cifar10, "is_present", lambda folder: True)
    monkeypatch.setattr(cifar10, "read", lambda folder: (colors(NUM_TRAIN), colors(NUM_TEST)))
    monkeypatch.setattr(torchvision_sets, "_PIXELS_SHA256", {})  # made-up pixels have other checksums


SETS = {  # event shape, validation images, the value's place in an image
    "fashion-mnist": ((1, 28, 28), 10_000, (0, 3, 5)),
    "kmnist": ((1, 28, 28), 10_000, (0, 3, 5)),
    "cifar10": ((3, 32, 32), 5_000, (0, 3, 5)),
    "svhn": ((3, 32, 32), 7_325, (0, 3, 5)),
}


@pytest.mark.parametrize("name", SETS)
def test_each_set_is_bytes_with_channels_first(torchvision: None, tmp_path: Path, name: str) -> None:
    read = data.load(name, data_dir=str(tmp_path))
    assert (read.kind, read.event_shape, read.train.dtype) == ("8-bit levels", SETS[name][0], torch.uint8)


@pytest.mark.parametrize("name", SETS)
def test_the_last_training_images_of_each_set_are_validation(torchvision: None, tmp_path: Path, name: str) -> None:
    read = data.load(name, data_dir=str(tmp_path))
    _, num_validation, place = SETS[name]
    for part, numbers in (
        (read.train, range(NUM_TRAIN - num_validation)),
        (read.validation, range(NUM_TRAIN - num_validation, NUM_TRAIN)),
        (read.test, range(NUM_TEST)),
    ):
        assert part[(slice(None), *place)].tolist() == [i % 251 for i in numbers]


@pytest.mark.parametrize("name", SETS)
def test_the_labels_of_each_set_follow_its_images(torchvision: None, tmp_path: Path, name: str) -> None:
    read = data.load(name, data_dir=str(tmp_path))
    first = NUM_TRAIN - SETS[name][1]
    assert read.labels["train"].tolist() == [i % 10 for i in range(first)]
    assert read.labels["validation"].tolist() == [i % 10 for i in range(first, NUM_TRAIN)]
    assert read.labels["test"].tolist() == [i % 10 for i in range(NUM_TEST)]
    assert len(read.class_names) == 10


@pytest.mark.parametrize("name", ["cifar10", "svhn"])
def test_red_stays_red(torchvision: None, tmp_path: Path, name: str) -> None:
    assert data.load(name, data_dir=str(tmp_path)).train[:, 1:].sum() == 0


@pytest.mark.parametrize("name", ["fashion-mnist", "kmnist"])
def test_gray_sets_of_torchvision_take_the_iwae_protocol(torchvision: None, tmp_path: Path, name: str) -> None:
    read = data.load(name, data_dir=str(tmp_path), protocol="iwae")
    assert [len(x) for x in (read.train, read.validation, read.test)] == [NUM_TRAIN, 0, NUM_TEST]


@pytest.mark.parametrize(
    ("given", "environment", "expected"),
    [("given", "environment", "given"), (None, "environment", "environment"), (None, None, "data")],
)
def test_the_data_folder_is_the_one_given_else_the_environments_else_data(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, given: str | None, environment: str | None, expected: str
) -> None:
    asked: list[str] = []

    def remember(root: str, train: bool, download: bool) -> Grays:
        asked.append(root)
        return Grays(root, train, download)

    install(monkeypatch, KMNIST=remember)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PPL_VAE_DATA_DIR", raising=False)
    if environment:
        monkeypatch.setenv("PPL_VAE_DATA_DIR", environment)
    data.load("kmnist", data_dir=given)
    assert set(asked) == {expected}


def test_no_torchvision_is_said_with_the_torch_that_it_must_match(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)  # import then raises ModuleNotFoundError
    with pytest.raises(ValueError, match="cifar10 needs torchvision, which cannot be imported") as refused:
        data.load("cifar10", data_dir=str(tmp_path))
    assert f"made for torch {torch.__version__}" in str(refused.value)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("operator torchvision::nms\ndoes not exist"), OSError("_C.so: undefined symbol")],
    ids=["RuntimeError", "OSError"],
)
def test_a_torchvision_of_another_torch_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception
) -> None:
    class Broken(ModuleType):
        def __getattr__(self, name: str) -> Any:
            raise error

    monkeypatch.setitem(sys.modules, "torchvision", Broken("torchvision"))
    with pytest.raises(ValueError, match=r"svhn needs torchvision, which cannot be imported \(\w+: ") as refused:
        data.load("svhn", data_dir=str(tmp_path))
    assert "\n" not in str(refused.value)


FAILURES = {
    "no network": OSError("<urlopen error [Errno -3]\nTemporary failure in name resolution>"),
    "no mirror": RuntimeError("Error downloading train-images-idx3-ubyte.gz"),
    "a damaged archive": EOFError("Compressed file ended before the end-of-stream marker was reached"),
    "no room": PermissionError(13, "Permission denied"),
}
PLACES = {
    "fashion-mnist": "FashionMNIST/raw/",
    "kmnist": "KMNIST/raw/",
    "cifar10": "cifar-10-binary.tar.gz of https://",
    "svhn": "train_32x32.mat and test_32x32.mat",
}


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("failure", FAILURES)
def test_a_failed_download_says_what_to_place_where(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, failure: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise FAILURES[failure]

    install(monkeypatch, FashionMNIST=fail, KMNIST=fail, SVHN=fail, utils=SimpleNamespace(download_url=fail))
    with pytest.raises(ValueError, match=f"{name} can be neither read from {tmp_path} nor downloaded") as refused:
        data.load(name, data_dir=str(tmp_path))
    assert f"place there {PLACES[name]}" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", PLACES)
def test_nothing_is_downloaded_where_it_may_not_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    def fetch(root: str, split: str = "train", download: bool = False, **_: object) -> None:
        if download:
            Path(root, "fetched").touch()
        raise RuntimeError("Dataset not found")

    install(monkeypatch, FashionMNIST=fetch, KMNIST=fetch, SVHN=fetch, utils=SimpleNamespace(download_url=fetch))
    with pytest.raises(ValueError, match=f"{name} cannot be read from {tmp_path}, into which nothing is downloaded"):
        data.load(name, data_dir=str(tmp_path), download=False)
    assert list(tmp_path.iterdir()) == []


def test_fashion_mnist_with_wrong_pixels_is_refused(
    torchvision: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torchvision_sets, "_PIXELS_SHA256", {"fashion-mnist": ("0" * 64, "0" * 64)})
    with pytest.raises(ValueError, match="holds no fashion-mnist, or it is damaged; place there FashionMNIST/raw/"):
        data.load("fashion-mnist", data_dir=str(tmp_path))


def test_images_of_another_size_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, SVHN=lambda root, split, download: Grays(root))
    with pytest.raises(ValueError, match="holds no svhn, or it is damaged"):
        data.load("svhn", data_dir=str(tmp_path))


def test_what_an_old_torchvision_pickled_is_not_read(torchvision: None, tmp_path: Path) -> None:
    (tmp_path / "KMNIST" / "processed").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"expected no folder KMNIST/processed.*remove it"):
        data.load("kmnist", data_dir=str(tmp_path))


class Unpacks(Grays):
    """As torchvision: writes beside the archives."""

    def __init__(self, root: str, train: bool = True, download: bool = False) -> None:
        raw = Path(root) / "KMNIST" / "raw"
        (raw / "unpacked").write_bytes(gzip.decompress((raw / "archive.gz").read_bytes()))
        super().__init__(root, train, download)


@pytest.fixture
def archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    raw = tmp_path / "KMNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / "archive.gz").write_bytes(gzip.compress(b"pixels"))
    install(monkeypatch, KMNIST=Unpacks)
    yield raw
    raw.chmod(0o755)


def test_archives_in_a_folder_that_is_read_only_are_unpacked_elsewhere(archives: Path, tmp_path: Path) -> None:
    archives.chmod(0o555)
    assert len(data.load("kmnist", data_dir=str(tmp_path)).test) == NUM_TEST
    assert [path.name for path in archives.iterdir()] == ["archive.gz"]


def test_archives_are_unpacked_where_nothing_may_be_downloaded(archives: Path, tmp_path: Path) -> None:
    assert len(data.load("kmnist", data_dir=str(tmp_path), download=False).test) == NUM_TEST


def test_archives_in_a_folder_that_can_be_written_are_unpacked_there(archives: Path, tmp_path: Path) -> None:
    data.load("kmnist", data_dir=str(tmp_path))
    assert (archives / "unpacked").read_bytes() == b"pixels"


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
def test_each_file_of_a_binary_set_gives_its_pixels(
    made_up: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str, nested: bool
) -> None:
    name, subfolder, write = FILES[kind]
    write(tmp_path / subfolder if nested else tmp_path)
    trust_mat(tmp_path, monkeypatch)
    read = data.load(name, data_dir=str(tmp_path))
    assert (read.kind, read.event_shape) == ("binary", (1, 28, 28))
    for split, bits in BITS.items():
        np.testing.assert_array_equal(getattr(read, split)[:, 0].numpy(), bits)


@pytest.mark.parametrize("kind", [kind for kind in FILES if "caltech" in kind])
def test_the_labels_of_silhouettes_count_from_0(
    made_up: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    name, _, write = FILES[kind]
    write(tmp_path)
    trust_mat(tmp_path, monkeypatch)
    read = data.load(name, data_dir=str(tmp_path))
    assert read.class_names == CLASSES
    assert {split: labels.tolist() for split, labels in read.labels.items()} == {
        split: [i % 3 for i in range(len(bits))] for split, bits in BITS.items()
    }


@pytest.mark.parametrize("kind", FILES)
def test_other_pixels_than_the_published_ones_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    name, _, write = FILES[kind]
    write(tmp_path)
    trust_mat(tmp_path, monkeypatch)
    with pytest.raises(ValueError, match=f"the checksum of train is not that of {name}; fetch the file again"):
        data.load(name, data_dir=str(tmp_path))


@pytest.mark.parametrize("kind", FILES)
def test_a_truncated_file_is_refused(made_up: None, tmp_path: Path, kind: str) -> None:
    name, _, write = FILES[kind]
    write(tmp_path)
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    message = r"not a readable array file|expected lines of 784 zeros and ones|checksum"
    with pytest.raises(ValueError, match=message) as refused:
        data.load(name, data_dir=str(tmp_path))
    assert "\n" not in str(refused.value)


def test_text_that_is_no_zeros_and_ones_is_refused(made_up: None, tmp_path: Path) -> None:
    write_amat(tmp_path)
    (tmp_path / "binarized_mnist_valid.amat").write_text("0 1 2\n" * 784)
    with pytest.raises(ValueError, match=r"valid.amat: expected lines of 784 zeros and ones"):
        data.load("static-mnist", data_dir=str(tmp_path))


def test_an_archive_of_other_arrays_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "caltech101_silhouettes.npz", train_images=BITS["train"])
    with pytest.raises(ValueError, match=r"expected the arrays train_images, .*, got no valid_images, test_images"):
        data.load("caltech-silhouettes", data_dir=str(tmp_path))


@pytest.mark.parametrize("name", ["caltech-silhouettes", "svhn"])
def test_without_scipy_a_matlab_file_is_refused_with_the_extra_that_brings_it(
    made_up: None, torchvision: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    write_mat(tmp_path)
    trust_mat(tmp_path, monkeypatch)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(ValueError, match=rf"{name} .* scipy.*\[datasets\]") as refused:
        data.load(name, data_dir=str(tmp_path))
    assert "\n" not in str(refused.value)


def test_a_mat_file_with_another_checksum_is_not_opened(
    made_up: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_mat(tmp_path)
    monkeypatch.setattr(binary_sets, "import_loadmat", lambda name: pytest.fail("it was opened"))
    with pytest.raises(ValueError, match=rf"{tmp_path}.*checksum is not that of the published file"):
        data.load("caltech-silhouettes", data_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("name", "file"), [("static-mnist", "static_mnist.npz"), ("caltech-silhouettes", "caltech101_silhouettes.npz")]
)
def test_a_missing_set_says_what_is_expected_where(tmp_path: Path, name: str, file: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected {file} or .* in {tmp_path} or .*; --data-dir or"):
        data.load(name, data_dir=str(tmp_path))


def test_an_amat_file_that_cannot_be_opened_is_refused(
    made_up: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(path: Path, mode: str) -> bytes:
        raise PermissionError(13, "Permission denied")

    write_amat(tmp_path)
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ValueError, match=r"binarized_mnist_train.amat cannot be read: Permission denied"):
        data.load("static-mnist", data_dir=str(tmp_path))


def test_one_amat_file_of_three_is_not_enough(made_up: None, tmp_path: Path) -> None:
    write_amat(tmp_path)
    (tmp_path / "binarized_mnist_test.amat").unlink()
    with pytest.raises(ValueError, match=r"static-mnist: expected static_mnist.npz or binarized_mnist_train.amat"):
        data.load("static-mnist", data_dir=str(tmp_path))


# --- The real files, where a machine has them ---


def real(file: str) -> Path:
    """The data folder that has this file; skips, visibly, where there is none."""
    folder = Path(os.environ.get("PPL_VAE_DATA_DIR", "data"))
    if not (folder / file).exists():
        pytest.skip(f"needs {file} in the folder that PPL_VAE_DATA_DIR names")
    return folder


STATIC, CALTECH = "static_mnist/static_mnist.npz", "caltech101_silhouettes/caltech101_silhouettes.npz"


@pytest.fixture(scope="module")
def published() -> SimpleNamespace:
    """Loaded once: the real sets, and their arrays by a second reading."""

    def named(name: str, file: str) -> tuple[data.Splits, Any]:
        folder = real(file)
        return data.load(name, data_dir=str(folder)), np.load(folder / file, allow_pickle=False)

    return SimpleNamespace(named=named)


def test_static_mnist_has_its_published_sizes(published: SimpleNamespace) -> None:
    read, _ = published.named("static-mnist", STATIC)
    assert [tuple(x.shape) for x in (read.train, read.validation, read.test)] == [
        (count, 1, 28, 28) for count in (50_000, 10_000, 10_000)
    ]


def test_static_mnist_scores_its_published_independent_pixels(published: SimpleNamespace) -> None:
    """Test log-likelihood of independent pixels at the training rates (Laplace + 1): -205.79 nats."""
    read, _ = published.named("static-mnist", STATIC)
    train, test = (x.flatten(1).numpy() for x in (read.train, read.test))
    rates = (train.sum(0, dtype=np.int64) + 1) / (len(train) + 2)
    white = test.mean(0, dtype=np.float64)
    assert (white @ np.log(rates) + (1 - white) @ np.log(1 - rates)).item() == pytest.approx(-205.79, abs=0.005)


def test_static_mnist_by_its_amat_files_is_the_same(published: SimpleNamespace, tmp_path: Path) -> None:
    """The smallest split is written as published: the digits in their rows, with the checksum of the real ones."""
    read, _ = published.named("static-mnist", STATIC)
    pixels = read.validation.flatten(1).numpy()
    text = np.full((len(pixels), 2 * 784), ord(" "), np.uint8)
    text[:, ::2] = pixels + ord("0")
    text[:, -1] = ord("\n")
    (tmp_path / "valid.amat").write_bytes(text.tobytes())
    again = binary_sets._read_amat(tmp_path / "valid.amat")
    assert hashlib.sha256(again.tobytes()).hexdigest() == binary_sets._STATIC_MNIST_SHA256["validation"]


def test_silhouettes_have_their_published_sizes(published: SimpleNamespace) -> None:
    read, _ = published.named("caltech-silhouettes", CALTECH)
    assert [len(x) for x in (read.train, read.validation, read.test)] == [4_100, 2_264, 2_307]
    assert len(read.class_names) == 101


def test_silhouettes_are_upright_in_a_background_of_ones(published: SimpleNamespace) -> None:
    read, stored = published.named("caltech-silhouettes", CALTECH)
    np.testing.assert_array_equal(read.test[:, 0].numpy(), stored["test_images"])
    corners = read.train[:, 0, ::27, ::27].float()
    assert corners.mean() > 0.95


def test_silhouettes_of_the_first_class_are_wider_than_high(published: SimpleNamespace) -> None:
    """Aeroplanes from the side: more columns than rows hold the object."""
    read, _ = published.named("caltech-silhouettes", CALTECH)
    assert read.class_names[0] == "Airplanes Side 2"
    planes = read.train[read.labels["train"] == 0, 0] == 0
    middle = planes.float().mean(0)
    assert (middle.mean(0) > 0.2).sum() > (middle.mean(1) > 0.2).sum()


def test_fashion_mnist_is_read_through_torchvision(tmp_path: Path) -> None:
    pytest.importorskip("torchvision", reason="needs torchvision", exc_type=Exception)
    read = data.load("fashion-mnist", data_dir=str(real("FashionMNIST/raw/train-images-idx3-ubyte.gz")))
    assert [len(x) for x in (read.train, read.validation, read.test)] == [50_000, 10_000, 10_000]


def test_fashion_mnists_checksums_are_those_of_its_files() -> None:
    folder = real("FashionMNIST/raw/train-images-idx3-ubyte.gz") / "FashionMNIST" / "raw"
    archives = (gzip.decompress((folder / f"{name}-images-idx3-ubyte.gz").read_bytes()) for name in ("train", "t10k"))
    checksums = tuple(hashlib.sha256(raw[16:]).hexdigest() for raw in archives)
    assert torchvision_sets._PIXELS_SHA256["fashion-mnist"] == checksums
