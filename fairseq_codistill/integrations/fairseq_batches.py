"""Owns the batches of a fairseq translation run for a model of another host, so that both can be in one run.

The Hugging Face trainer takes them as its training data. What makes a batch is fairseq's: the binarised data, the
grouping by ``--max-tokens``, the order of an epoch. Nothing here trains.
"""

import hashlib
from typing import Any

import numpy as np
import torch
from fairseq.data import data_utils
from fairseq.tasks.translation import TranslationConfig, TranslationTask
from torch import Tensor
from torch.utils.data import Dataset

from fairseq_codistill.config import ConfigError
from fairseq_codistill.environment import data_seed_of_environment
from fairseq_codistill.integrations.transformers_data import IDS

UNLIMITED = 1024  # fairseq's own --max-source-positions and --max-target-positions


class FairseqBatches(Dataset):
    """Training data whose samples are whole batches, those of ``fairseq-train --task codistill_translation``.

    Give it to a ``CodistillSeq2SeqTrainer`` as ``train_dataset``, with :meth:`collate` as ``data_collator`` and
    ``per_device_train_batch_size=1``. Its model needs the dictionary's symbols: ``vocab_size=len(dictionary)`` and
    ``pad_token_id=1, bos_token_id=0, eos_token_id=2, decoder_start_token_id=2``.

    Args:
        data: folder that fairseq-preprocess wrote.
        source_lang, target_lang: as in ``--source-lang`` and ``--target-lang``.
        max_tokens: ``--max-tokens`` of the fairseq model, or
        batch_size: its ``--batch-size``.
        data_seed: ``--codistill-data-seed``; default: that of the environment (``CODISTILL_DATA_SEED``), or 1.
        required_batch_size_multiple: its option of that name.
        max_positions: longest source and target that its model takes.

    Attributes:
        dictionary: of the target language.
        data_seed: as given, or found.
    """

    def __init__(
        self,
        data: str,
        source_lang: str,
        target_lang: str,
        max_tokens: int | None = None,
        batch_size: int | None = None,
        data_seed: int | None = None,
        required_batch_size_multiple: int = 8,
        max_positions: tuple[int, int] = (UNLIMITED, UNLIMITED),
    ):
        data_seed = data_seed_of_environment() if data_seed is None else data_seed
        # Without a command line three of its fields would be names of other options.
        resolved: dict[str, Any] = {"dataset_impl": None, "required_seq_len_multiple": 1, "train_subset": "train"}
        task = TranslationTask.setup_task(
            TranslationConfig(data=data, source_lang=source_lang, target_lang=target_lang, **resolved)
        )
        task.load_dataset("train")
        self.dictionary = task.target_dictionary
        self._dataset, self.data_seed = task.dataset("train"), data_seed
        self._settings = {
            "--task": "translation",
            "--max-tokens": max_tokens,
            "--batch-size": batch_size,
            "--required-batch-size-multiple": required_batch_size_multiple,
            "--curriculum": 0,
        }
        iterator = task.get_batch_iterator(
            self._dataset, max_tokens=max_tokens, max_sentences=batch_size, max_positions=max_positions,
            ignore_invalid_inputs=True, required_batch_size_multiple=required_batch_size_multiple, seed=data_seed,
        )  # fmt: skip
        self._frozen = list(iterator.frozen_batches)
        self.set_epoch(0)

    def __len__(self) -> int:
        """Batches of an epoch, over all ranks."""
        return len(self._frozen)

    def set_epoch(self, epoch: int) -> None:
        """Their order in an epoch, from 0, is fairseq's."""
        self._batches = list(self._frozen)
        with data_utils.numpy_seed(self.data_seed + epoch + 1):
            np.random.shuffle(self._batches)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A batch as the trainer's models take it, and the numbers of its sentences."""
        batch = self._dataset.collater([self._dataset[sentence] for sentence in self._batches[index]])
        source, target = batch["net_input"]["src_tokens"], batch["target"]
        return {
            "input_ids": source,
            "attention_mask": source.ne(self.dictionary.pad()).long(),
            "decoder_input_ids": batch["net_input"]["prev_output_tokens"],
            "labels": target.masked_fill(target.eq(self.dictionary.pad()), -100),
            IDS: batch["id"].tolist(),
        }

    @staticmethod
    def collate(batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """One sample is a batch already.

        Raises:
            ConfigError: there are several.
        """
        if len(batches) != 1:
            raise ConfigError(f"per_device_train_batch_size is {len(batches)}; it must be 1: a sample is a batch")
        return batches[0]

    def settings_to_agree_on(self, num_batches: int, update_freq: int) -> dict[str, Any]:
        """What a fairseq model tells the others, by the names that it has for them.

        Raises:
            ConfigError: the ranks cannot share the batches evenly, as those of fairseq would.
        """
        world_size = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        if len(self) % world_size:
            raise ConfigError(
                f"{len(self)} batches are no multiple of {world_size} ranks, and fairseq ends such an epoch otherwise; "
                "use one rank a model, or another --max-tokens"
            )
        symbols = self.dictionary.symbols
        digest = hashlib.blake2b("\n".join(symbols).encode(), digest_size=6).hexdigest()
        return {
            **self._settings,
            "--update-freq": [update_freq],
            "batches per epoch": num_batches,
            "target dictionary": f"{len(symbols)} symbols, digest {digest}",
        }
