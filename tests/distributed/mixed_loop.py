"""A Hugging Face model on the batches of a fairseq run: ``mixed_loop.py OUT SEED DATA [--own-data]``."""

import sys

import torch
from transformers import BartConfig, BartForConditionalGeneration, Seq2SeqTrainingArguments

from fairseq_codistill.integrations.fairseq_batches import FairseqBatches
from fairseq_codistill.integrations.transformers_trainer import CodistillSeq2SeqTrainer


def main():
    out, seed, data = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    batches = FairseqBatches(data, "en", "de", max_tokens=200, required_batch_size_multiple=1)
    torch.manual_seed(seed)
    sizes = dict.fromkeys(("encoder_layers", "decoder_layers"), 1)
    sizes |= dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "d_model"), 32)
    sizes |= dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2)
    model = BartForConditionalGeneration(
        BartConfig(vocab_size=len(batches.dictionary), max_position_embeddings=64, pad_token_id=1, bos_token_id=0,
                   eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None, **sizes)
    )  # fmt: skip
    args = Seq2SeqTrainingArguments(
        output_dir=out + ".files", seed=seed, use_cpu=True, learning_rate=5e-3, num_train_epochs=3, logging_steps=1,
        per_device_train_batch_size=1, train_sampling_strategy="sequential", save_strategy="no", report_to=[],
        disable_tqdm=True,
    )  # fmt: skip
    dataset, collator = batches, batches.collate
    if "--own-data" in sys.argv:
        dataset = [
            {name: value[0] for name, value in batches[i].items() if isinstance(value, torch.Tensor)}
            for i in range(len(batches))
        ]
        collator = None
    trainer = CodistillSeq2SeqTrainer(model=model, args=args, train_dataset=dataset, data_collator=collator)
    trainer.train()
    torch.save(trainer.state.log_history, out)


if __name__ == "__main__":
    main()
