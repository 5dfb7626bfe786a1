"""Task ``python_source``: predict the next character of the source of Python's own library, which is always there."""

import importlib
import inspect
import string
from dataclasses import dataclass, field

import torch
from fairseq.data import Dictionary, ListDataset, MonolingualDataset, TokenBlockDataset
from fairseq.dataclass import FairseqDataclass
from fairseq.tasks import FairseqTask, register_task


@dataclass
class PythonSourceConfig(FairseqDataclass):
    train_modules: str = field(default="textwrap,bisect,heapq", metadata={"help": "what to learn from"})
    valid_modules: str = field(default="shlex", metadata={"help": "what to validate on"})
    tokens_per_sample: int = field(default=64, metadata={"help": "characters of one sample"})


@register_task("python_source", dataclass=PythonSourceConfig)
class PythonSourceTask(FairseqTask):
    def __init__(self, cfg):
        super().__init__(cfg)
        self.dictionary = Dictionary()
        for character in string.printable:
            self.dictionary.add_symbol(character)

    def load_dataset(self, split, **kwargs):
        names = (self.cfg.train_modules if split == "train" else self.cfg.valid_modules).split(",")
        text = "".join(inspect.getsource(importlib.import_module(name)) for name in names)
        characters = torch.tensor([self.dictionary.index(character) for character in text])
        pad, eos = self.dictionary.pad(), self.dictionary.eos()
        blocks = TokenBlockDataset(
            ListDataset([characters], [len(text)]), [len(text)], self.cfg.tokens_per_sample, pad, eos,
            break_mode="none", include_targets=True,
        )  # fmt: skip
        self.datasets[split] = MonolingualDataset(
            blocks, blocks.sizes, self.dictionary, self.dictionary,
            add_eos_for_other_targets=False, shuffle=True, targets=["future"],
        )  # fmt: skip

    @property
    def source_dictionary(self):
        return self.dictionary

    @property
    def target_dictionary(self):
        return self.dictionary
