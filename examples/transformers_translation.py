"""Two small encoder-decoders of transformers learn to translate and teach each other; started by itself, one is alone.

codistill-launch --num-models 2 -- python examples/transformers_translation.py
codistill-launch --num-models 2 -- python examples/transformers_translation.py --data FOLDER --codistill-codec topk:8

Every option of transformers' Seq2SeqTrainingArguments and of codistillation can be given.
"""

import dataclasses
import io
from pathlib import Path

import sacrebleu
import sentencepiece
import torch
from transformers import BartConfig, BartForConditionalGeneration, HfArgumentParser, Seq2SeqTrainingArguments

from fairseq_codistill.integrations.transformers_arguments import CodistillArguments
from fairseq_codistill.integrations.transformers_outputs import token_loss
from fairseq_codistill.integrations.transformers_trainer import CodistillSeq2SeqTrainer

PAD, UNKNOWN, BEGIN, END = range(4)


@dataclasses.dataclass
class Options:
    data: str = dataclasses.field(
        default="", metadata={"help": "folder of {train,test}.{de,en}; default: number words"}
    )
    num_pairs: int = dataclasses.field(default=4000, metadata={"help": "of number words to train on"})
    vocabulary: int = dataclasses.field(default=600, metadata={"help": "subwords of both languages together"})
    width: int = dataclasses.field(default=128, metadata={"help": "of the model"})


def read_pairs(options: Options) -> dict[str, list[tuple[str, str]]]:
    """Split -> (German, English) sentences."""
    if not options.data:
        from fairseq_codistill.demo.corpus import make_splits  # pip install 'fairseq-codistill[demo]'

        return dict(zip(("train", "test"), make_splits(1, (options.num_pairs, 200)), strict=True))
    folder = Path(options.data)
    sides = {
        split: [(folder / f"{split}.{language}").read_text(encoding="utf-8").splitlines() for language in ("de", "en")]
        for split in ("train", "test")
    }
    return {split: list(zip(*texts, strict=True)) for split, texts in sides.items()}


def collate(samples: list[dict]) -> dict[str, torch.Tensor]:
    def padded(name: str, value: int) -> torch.Tensor:
        rows = [torch.tensor(sample[name]) for sample in samples]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

    inputs, labels = padded("input_ids", PAD), padded("labels", -100)
    # The trainer keeps the labels for its own loss, and a model that saw none would shift its source instead.
    shifted = torch.nn.functional.pad(labels[:, :-1], (1, 0), value=END)
    return {
        "input_ids": inputs,
        "attention_mask": (inputs != PAD).long(),
        "labels": labels,
        "decoder_input_ids": shifted.masked_fill(shifted == -100, PAD),
    }


@torch.no_grad()
def translate(
    model: torch.nn.Module, subwords: sentencepiece.SentencePieceProcessor, sentences: list[str]
) -> list[str]:
    model.eval()
    found = []
    for first in range(0, len(sentences), 50):
        sources = [subwords.encode(text) + [END] for text in sentences[first : first + 50]]
        batch = collate([{"input_ids": source, "labels": [END]} for source in sources])
        source = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
        tokens = model.generate(**source, max_new_tokens=80, num_beams=4).tolist()
        found += [subwords.decode([token for token in row if token > END]) for row in tokens]
    return found


def main() -> None:
    parser = HfArgumentParser((Options, Seq2SeqTrainingArguments, CodistillArguments))
    parser.set_defaults(
        output_dir="transformers-translation", per_device_train_batch_size=32, num_train_epochs=8, learning_rate=2e-3,
        warmup_steps=100, logging_steps=50, save_strategy="no", report_to="none", disable_tqdm=True,
        codistill_divergence="kl",
    )  # fmt: skip
    options, args, codistill = parser.parse_args_into_dataclasses()
    me = codistill.config().codistill_model_index
    args.seed += me  # another start and other dropout for every model
    args.output_dir = f"{args.output_dir}/{me}"

    pairs = read_pairs(options)
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text for pair in pairs["train"] for text in pair]), model_writer=trained,
        vocab_size=options.vocabulary, model_type="bpe", pad_id=PAD, unk_id=UNKNOWN, bos_id=BEGIN, eos_id=END,
        minloglevel=2,
    )  # fmt: skip
    subwords = sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue())
    samples = [
        {"input_ids": subwords.encode(german) + [END], "labels": subwords.encode(english) + [END]}
        for german, english in pairs["train"]
    ]
    torch.manual_seed(args.seed)
    width = options.width
    model = BartForConditionalGeneration(
        BartConfig(
            vocab_size=options.vocabulary, d_model=width, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=2 * width,
            decoder_ffn_dim=2 * width, encoder_attention_heads=4, decoder_attention_heads=4, pad_token_id=PAD,
            bos_token_id=BEGIN, eos_token_id=END, decoder_start_token_id=END, forced_eos_token_id=None,
            max_position_embeddings=256,
        )
    )  # fmt: skip
    trainer = CodistillSeq2SeqTrainer(
        model=model, args=args, train_dataset=samples, data_collator=collate, codistill=codistill,
        compute_loss_func=None if args.label_smoothing_factor else token_loss,  # BART's own is that of a micro-batch
    )  # fmt: skip
    trainer.train()
    if trainer.is_world_process_zero():
        bleu = sacrebleu.metrics.BLEU()
        german, english = zip(*pairs["test"], strict=True)
        score = bleu.corpus_score(translate(trainer.accelerator.unwrap_model(model), subwords, list(german)), [english])
        print(f"model {me}  BLEU {score.score:.1f}  {bleu.get_signature()}", flush=True)


if __name__ == "__main__":
    main()
