"""Which dictionaries a teacher of fairseq must know, and what is said where that cannot be seen for sure."""

import os
from types import SimpleNamespace

import pytest
from fairseq.data import Dictionary
from fairseq.tasks.translation import TranslationTask

from fairseq_codistill.config import ConfigError
from fairseq_codistill.fairseq_side import teacher_checkpoints


@pytest.fixture
def check(tmp_path):
    """Compares the dictionary in a teacher's data folder with one of some words, and what its task adds to it."""
    (tmp_path / "dict.en.txt").write_text("one 3\ntwo 2\n")
    (tmp_path / "teacher.pt").touch()

    def compare(*words, added=()):
        own = Dictionary()
        for word in (*words, *added):
            own.add_symbol(word)
        task = TranslationTask.__new__(TranslationTask)
        task.src_dict, task.tgt_dict = own, None
        theirs = SimpleNamespace(data=str(tmp_path), source_lang="en", target_lang=None)
        teacher_checkpoints._check_dictionaries("flag", str(tmp_path / "teacher.pt"), theirs, task)

    return compare


def test_what_a_task_adds_behind_its_dictionary_makes_no_other_one(check):
    check("one", "two", added=["[en]", "<mask>"])
    with pytest.raises(ConfigError, match="another source dictionary"):
        check("one", "three")
    with pytest.raises(ConfigError, match="another source dictionary"):
        check("one")


def test_a_dictionary_that_is_newer_than_its_teacher_is_told_of(check, tmp_path, caplog):
    os.utime(tmp_path / "dict.en.txt", (1, 1))
    check("one", "two")
    assert "is newer" not in caplog.text
    os.utime(tmp_path / "teacher.pt", (0, 0))
    check("one", "two")
    assert "is newer" in caplog.text
