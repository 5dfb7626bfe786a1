"""Two adapters of one causal language model (LoRA, by peft) are tuned side by side and teach each other.

codistill-launch --num-models 2 -- python examples/transformers_lora.py --text FILE --model FOLDER
codistill-launch --num-models 2 -- python examples/transformers_lora.py

FOLDER holds a model and its tokenizer, as save_pretrained wrote them; nothing is downloaded. Without it the model is a
small one with random weights that reads bytes, and its last layer is trained too: that shows how it works, no more.
"""

import dataclasses
import heapq
import inspect
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, LlamaConfig, TrainingArguments

from fairseq_codistill.integrations.transformers_arguments import CodistillArguments
from fairseq_codistill.integrations.transformers_trainer import CodistillTrainer


@dataclasses.dataclass
class Options:
    model: str = dataclasses.field(default="", metadata={"help": "local folder of a causal model and its tokenizer"})
    text: str = dataclasses.field(default="", metadata={"help": "file to learn; default: a module of Python's library"})
    length: int = dataclasses.field(default=64, metadata={"help": "tokens of a sample"})
    rank: int = dataclasses.field(default=8, metadata={"help": "of the adapters"})


def main() -> None:
    parser = HfArgumentParser((Options, TrainingArguments, CodistillArguments))
    parser.set_defaults(
        output_dir="transformers-lora", per_device_train_batch_size=8, num_train_epochs=3, learning_rate=3e-3,
        logging_steps=10, eval_strategy="epoch", save_strategy="no", report_to="none", disable_tqdm=True,
        codistill_divergence="kl", codistill_codec="topk:8",
    )  # fmt: skip
    options, args, codistill = parser.parse_args_into_dataclasses()
    me = codistill.config().codistill_model_index
    args.seed += me  # other adapters and other dropout for every model
    args.output_dir = f"{args.output_dir}/{me}"

    text = Path(options.text).read_text(encoding="utf-8") if options.text else inspect.getsource(heapq)
    if options.model:
        model = AutoModelForCausalLM.from_pretrained(options.model, local_files_only=True)
        tokens = AutoTokenizer.from_pretrained(options.model, local_files_only=True)(text)["input_ids"]
        also_trained = None
    else:
        torch.manual_seed(0)  # all models tune one and the same
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=256, **sizes))
        tokens, also_trained = list(text.encode()), ["lm_head"]
    torch.manual_seed(args.seed)
    model = get_peft_model(
        model,
        LoraConfig(
            r=options.rank, lora_alpha=2 * options.rank, lora_dropout=0.1, target_modules="all-linear",
            modules_to_save=also_trained, task_type="CAUSAL_LM",
        ),
    )  # fmt: skip
    pieces = [
        tokens[first : first + options.length] for first in range(0, len(tokens) - options.length, options.length)
    ]
    samples = [{"input_ids": piece, "labels": piece} for piece in pieces]
    unseen = len(samples) // 10
    trainer = CodistillTrainer(
        model=model, args=args, train_dataset=samples[:-unseen], eval_dataset=samples[-unseen:], codistill=codistill
    )
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "codistill_agreement" in entry]
    loss = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    if trainer.is_world_process_zero():
        agreement = f"  agreement {log[-1]['codistill_agreement']:.3f}" if log else ""
        print(f"model {me}  loss of unseen text {loss[0]:.3f} -> {loss[-1]:.3f}{agreement}", flush=True)


if __name__ == "__main__":
    main()
