"""Owns what is kept of the teachers' predictions in a folder: those of a sample are computed once, and read later.

A sample is found by its fingerprint alone, so a prediction of another one is never read. A folder of other teachers,
data or codecs is refused before training, and one whose samples have changed at the first of them. It never computes
a prediction.
"""

import fcntl
import json
import logging
import os
import struct
import uuid
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from fairseq_codistill.coordinator.codecs.choice import make_codec
from fairseq_codistill.coordinator.keys import FINGERPRINT_BYTES, SampleMarks
from fairseq_codistill.coordinator.predictions import PeerPredictions, Tokens, TopK
from fairseq_codistill.option import ConfigError
from fairseq_codistill.whole_files import SaveError, whole_file

logger = logging.getLogger(__name__)
FORMAT = 1
HEADER, SUFFIX = "cache.json", ".rows"
NO_ID = -1
MAX_SHARDS = 4096
# Of one sample and one teacher: fingerprint, id, teacher, rows, classes, bytes of the payload, its checksum.
RECORD = struct.Struct(f"<{FINGERPRINT_BYTES}sqIIIII")


class TeacherCache:
    """One process's view of the folder: it reads what all have written before it began, and adds to a file of its own.

    Args:
        folder: made where it is not there.
        codec: ``topk:K`` or ``tokens:K``.
        teachers: a digest of each teacher, hex.
        about: what the samples belong to (dictionary, classes, ...); name -> JSON value.

    Raises:
        ConfigError: it belongs to other teachers, data or codecs, or cannot be written.
    """

    def __init__(self, folder: str, codec: str, teachers: Sequence[str], about: Mapping[str, Any]):
        self._folder, self._codec = Path(folder), make_codec(codec)
        self._num_teachers = len(teachers)
        self._where: dict[tuple[bytes, int], tuple[BinaryIO, int, int, int, int]] = {}
        self._marks: dict[int, bytes] = {}  # id -> the sample that it was
        header = {"format": FORMAT, "teachers": list(teachers), "codec": codec, "data": dict(about)}
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._check(json.loads(json.dumps(header)))
            self._own = self._open_own()
            for path in sorted(self._folder.glob(f"*{SUFFIX}")):
                try:
                    self._read_shard(path)
                except PermissionError:
                    logger.warning("codistillation: %s is another user's and cannot be read: computed anew", path)
        except (OSError, SaveError) as error:
            why = getattr(error, "strerror", None) or error
            raise ConfigError(f"--codistill-teacher-cache is {folder!r}, which cannot be used: {why}") from error

    def __len__(self) -> int:
        return len(self._where)

    def read(self, samples: SampleMarks, num_classes: int, like: torch.device) -> list[PeerPredictions] | None:
        """What each teacher predicts for a batch, in batch order; None unless all of it is there.

        Raises:
            ConfigError: a sample has changed since its predictions were stored.
        """
        found = []
        for teacher in range(self._num_teachers):
            parts = []
            for index, (mark, num_rows) in enumerate(zip(samples.marks, samples.num_rows, strict=True)):
                entry = self._where.get((mark, teacher))
                if entry is None:
                    self._check_known(samples, index)
                    return None
                if entry[1:3] != (num_rows, num_classes):
                    raise self._stale(f"a sample with {num_rows} rows of {num_classes} classes has {entry[1:3]} in it")
                parts.append(self._decoded(entry))
            found.append(_concatenated(parts))
        return [one.to(like) for one in found]

    def add(self, samples: SampleMarks, logits: Sequence[Tensor]) -> None:
        """Keep what each teacher predicts for a batch.

        Args:
            logits: of each teacher, (sum of ``samples.num_rows``, num_classes).
        """
        for teacher, whole in enumerate(logits):
            start = 0
            for index, (mark, num_rows) in enumerate(zip(samples.marks, samples.num_rows, strict=True)):
                rows, start = whole[start : start + num_rows], start + num_rows
                if (mark, teacher) in self._where:
                    continue
                payload = bytes(self._codec.encode(rows, _seed(mark, teacher)))
                sample_id = samples.ids[index] if samples.ids else NO_ID
                shape = (num_rows, whole.size(1))
                record = RECORD.pack(mark, sample_id, teacher, *shape, len(payload), zlib.crc32(payload))
                place = self._own.seek(0, os.SEEK_END) + RECORD.size
                self._own.write(record + payload)
                self._note(mark, sample_id, teacher, (self._own, *shape, place, len(payload)))
        self._own.flush()

    def _check(self, header: dict[str, Any]) -> None:
        path = self._folder / HEADER
        if not path.exists():
            with whole_file(path, f".{uuid.uuid4().hex}") as file:  # processes of several hosts may have one number
                file.write(json.dumps(header, indent=1).encode())
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise self._stale(f"{HEADER} in it cannot be read") from error
        names = [name for name in header if not isinstance(found, dict) or found.get(name) != header[name]]
        if names:
            raise self._stale(
                "; ".join(f"{name}: {found.get(name)!r} there, {header[name]!r} here" for name in names)
                if isinstance(found, dict)
                else f"{HEADER} in it is none of ours"
            )

    def _stale(self, why: str) -> ConfigError:
        return ConfigError(
            f"--codistill-teacher-cache is {str(self._folder)!r}, which does not belong to this run ({why}); give "
            "another folder, or remove it; where inputs or targets are drawn anew in every pass, leave the cache out"
        )

    def _open_own(self) -> BinaryIO:
        """A file that no other process writes to."""
        for number in range(MAX_SHARDS):
            path = self._folder / f"{number}{SUFFIX}"
            try:
                file = path.open("a+b")
            except PermissionError:
                if not path.exists():
                    raise
                continue  # another user's
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return file
            except BlockingIOError:
                file.close()
        raise ConfigError(
            f"--codistill-teacher-cache is {str(self._folder)!r}: all {MAX_SHARDS} files in it are others'; give "
            "another folder"
        )

    def _read_shard(self, path: Path) -> None:
        """Note where everything is. What a process that died left half-written ends the file, and so do the zeros that
        a power cut leaves of what was not on the disk yet."""
        is_own = path.name == Path(self._own.name).name
        file, start, size = self._own if is_own else path.open("rb"), 0, path.stat().st_size
        while start + RECORD.size <= size:
            file.seek(start)
            mark, sample_id, teacher, num_rows, num_classes, length, _ = RECORD.unpack(file.read(RECORD.size))
            if not num_classes or start + RECORD.size + length > size:
                break
            self._note(mark, sample_id, teacher, (file, num_rows, num_classes, start + RECORD.size, length))
            start += RECORD.size + length
        if is_own and start < size:
            file.truncate(start)

    def _note(self, mark: bytes, sample_id: int, teacher: int, entry: tuple[BinaryIO, int, int, int, int]) -> None:
        self._where[mark, teacher] = entry
        if sample_id != NO_ID:
            self._marks[sample_id] = mark

    def _check_known(self, samples: SampleMarks, index: int) -> None:
        known = self._marks.get(samples.ids[index]) if samples.ids else None
        if known not in (None, samples.marks[index]):
            raise self._stale(f"sample {samples.ids[index]} was another one when its predictions were stored")

    def _decoded(self, entry: tuple[BinaryIO, int, int, int, int]) -> PeerPredictions:
        file, num_rows, num_classes, start, length = entry
        payload = os.pread(file.fileno(), length, start)
        checksum = RECORD.unpack(os.pread(file.fileno(), RECORD.size, start - RECORD.size))[-1]
        if zlib.crc32(payload) != checksum:
            raise self._stale(f"{file.name} is damaged")
        decoded: PeerPredictions = self._codec.decode(
            payload, num_rows, num_classes, seed=0
        )  # neither codec draws to read
        return decoded


def _seed(mark: bytes, teacher: int) -> int:
    return int.from_bytes(mark[:7], "little") + teacher


def _concatenated(parts: list[Any]) -> PeerPredictions:
    if isinstance(parts[0], TopK):
        return TopK(
            torch.cat([part.values for part in parts]),
            torch.cat([part.classes for part in parts]),
            torch.cat([part.log_norm for part in parts]),
        )
    return Tokens(torch.cat([part.classes for part in parts]))
