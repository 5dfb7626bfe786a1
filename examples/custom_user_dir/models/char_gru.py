"""Model ``char_gru``: a recurrent network that predicts the next symbol."""

from dataclasses import dataclass, field

from fairseq.dataclass import FairseqDataclass
from fairseq.models import FairseqDecoder, FairseqLanguageModel, register_model
from torch import nn


@dataclass
class CharGRUConfig(FairseqDataclass):
    width: int = field(default=64, metadata={"help": "of the embeddings and of the state"})
    dropout: float = field(default=0.1, metadata={"help": "of what the network reads and of what it says"})


class GRUDecoder(FairseqDecoder):
    def __init__(self, dictionary, width, dropout):
        super().__init__(dictionary)
        self.embed = nn.Embedding(len(dictionary), width, dictionary.pad())
        self.dropout = nn.Dropout(dropout)
        self.gru = nn.GRU(width, width, batch_first=True)
        self.output = nn.Linear(width, len(dictionary))

    def forward(self, prev_output_tokens, **kwargs):
        states, _ = self.gru(self.dropout(self.embed(prev_output_tokens)))
        return self.output(self.dropout(states)), None  # (batch, length, symbols)

    def max_positions(self):
        return 1024


@register_model("char_gru", dataclass=CharGRUConfig)
class CharGRU(FairseqLanguageModel):
    @classmethod
    def build_model(cls, cfg, task):
        return cls(GRUDecoder(task.target_dictionary, cfg.width, cfg.dropout))
