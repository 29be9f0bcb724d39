"""The wording of every report, one file per kind of result. To change a sentence, change it here."""
