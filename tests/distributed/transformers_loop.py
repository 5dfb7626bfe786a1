"""One model in the Hugging Face trainer, as a user would write it: ``transformers_loop.py OUT SEED [options]``.

Its place among the models comes from the environment. Every training loss, the log and the parameters of the end are
written to OUT. torchrun's variables make it one rank of several.
"""

import argparse
import os
import signal

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    Seq2SeqTrainingArguments,
)
from transformers.distributed import DistributedConfig

from fairseq_codistill.integrations.transformers_outputs import token_loss
from fairseq_codistill.integrations.transformers_trainer import CodistillSeq2SeqTrainer, CodistillTrainer

NUM_SAMPLES, BATCH_SIZE, VOCABULARY, MAX_LENGTH = 52, 4, 11, 7
PAD = 0


def make_data(num_samples=NUM_SAMPLES):
    """Sequences of 3 to 7 symbols, and what is to be learned of each: itself, without some that do not count."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for _ in range(num_samples):
        length = int(torch.randint(3, MAX_LENGTH + 1, (), generator=generator))
        symbols = torch.randint(2, VOCABULARY, (length,), generator=generator)
        labels = symbols.clone()
        labels[0] = -100  # as of a prompt
        samples.append({"input_ids": symbols, "labels": labels})
    return samples


def collate(samples):
    """Padded to the longest; labels of padding are -100."""
    length = max(len(sample["input_ids"]) for sample in samples)
    inputs, labels = torch.full((len(samples), length), PAD), torch.full((len(samples), length), -100)
    for row, sample in enumerate(samples):
        size = len(sample["input_ids"])
        inputs[row, :size], labels[row, :size] = sample["input_ids"], sample["labels"]
    return {"input_ids": inputs, "attention_mask": (inputs != PAD).long(), "labels": labels}


def collate_for_encoder_decoder(samples):
    """With what the decoder reads, its labels one place later: the trainer may keep the labels from the model."""
    batch = collate(samples)
    shifted = torch.cat([torch.ones(len(samples), 1, dtype=torch.int64), batch["labels"][:, :-1]], 1)
    return {**batch, "decoder_input_ids": shifted.masked_fill(shifted == -100, PAD)}


def make_model(kind, seed, dropout=0.0):
    if kind == "lora":  # all models tune one and the same
        return add_lora(make_model("causal", 0), seed, dropout)
    torch.manual_seed(seed)
    if kind == "encoder-decoder":
        sizes = dict.fromkeys(("encoder_layers", "decoder_layers"), 1)
        sizes |= dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "d_model"), 16)
        sizes |= dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2)
        return BartForConditionalGeneration(
            BartConfig(vocab_size=VOCABULARY, max_position_embeddings=16, dropout=dropout, pad_token_id=PAD,
                       bos_token_id=1, eos_token_id=1, decoder_start_token_id=1, forced_eos_token_id=1, **sizes)
        )  # fmt: skip
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                    num_attention_heads=2, max_position_embeddings=16, attention_dropout=dropout, pad_token_id=PAD)
    )  # fmt: skip


def make_sharded_model(kind, seed, folder):
    """The same in shards, FSDP2: accelerate makes none on CPUs, but transformers does where it loads a model."""
    base = make_model("causal", 0 if kind == "lora" else seed)
    base.save_pretrained(folder)  # transformers writes it on the first rank alone
    dist.barrier()
    model = LlamaForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(fsdp_size=2))
    return model if kind == "causal" else add_lora(model, seed, 0.0)


def add_lora(model, seed, dropout):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    return get_peft_model(
        model, LoraConfig(r=2, lora_alpha=4, lora_dropout=dropout, target_modules=["q_proj", "v_proj"])
    )


def whole(value):
    return value.full_tensor() if isinstance(value, DTensor) else value.detach()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("seed", type=int)
    parser.add_argument("--kind", default="causal", choices=["causal", "encoder-decoder", "lora"])
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--samples", type=int, default=NUM_SAMPLES)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--fsdp", action="store_true")
    parser.add_argument("--smoothing", type=float, default=0.0)
    parser.add_argument("--save-every", type=int, default=0)
    parser.add_argument("--kill-after", type=int, default=0)
    parser.add_argument("--until", default="", help="end once this file exists")
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    strategy = (
        {"save_strategy": "steps", "save_steps": options.save_every, "save_total_limit": 2}
        if options.save_every
        else {}
    )
    args = Seq2SeqTrainingArguments(
        output_dir=options.out + ".files", seed=options.seed, use_cpu=True, optim="sgd", learning_rate=0.1,
        lr_scheduler_type="constant", max_grad_norm=0.0, max_steps=options.updates, logging_steps=1, report_to=[],
        per_device_train_batch_size=BATCH_SIZE, gradient_accumulation_steps=options.accumulate, bf16=options.bf16,
        dataloader_num_workers=options.workers, disable_tqdm=True, label_smoothing_factor=options.smoothing,
        **{"save_strategy": "no", **strategy},
    )  # fmt: skip
    losses = []
    base = CodistillSeq2SeqTrainer if options.kind == "encoder-decoder" else CodistillTrainer

    class Recording(base):
        def training_step(self, *given):
            loss = super().training_step(*given)
            losses.append((self.state.global_step, float(loss)))
            if options.kill_after and self.state.global_step == options.kill_after:
                os.kill(os.getpid(), signal.SIGKILL)
            self.control.should_training_stop |= os.path.exists(options.until)
            return loss

        def log(self, logs, *given):
            super().log(logs, *given)
            print(self.state.global_step, logs.get("codistill_peers"), flush=True)

    if options.fsdp:
        assert args.process_index >= 0  # with it the group of the ranks is there
        model = make_sharded_model(options.kind, options.seed, f"{options.out}.base")
    else:
        model = make_model(options.kind, options.seed, options.dropout)
    own = {"data_collator": collate}
    if options.kind == "encoder-decoder":
        own = {"data_collator": collate_for_encoder_decoder}
        own |= {} if options.smoothing else {"compute_loss_func": token_loss}
    trainer = Recording(model=model, args=args, train_dataset=make_data(options.samples), **own)
    trainer.train(resume_from_checkpoint=options.resume)
    found = {
        "losses": losses,
        "log": trainer.state.log_history,
        "sharded": [name for name, value in trainer.model.named_parameters() if isinstance(value, DTensor)],
        "model": {name: whole(value) for name, value in trainer.model.named_parameters()},
    }
    if trainer.is_world_process_zero():
        torch.save(found, options.out)


if __name__ == "__main__":
    main()
