"""Teach the shipped model to write about software, with a LoRA on its attention and its experts.

The experts stay in 8 bit; PEFT and transformers' Trainer are as they come. The text is this
repository's documentation, if no other is named; its last tenth is kept for measuring. A minute or
two on two cores.

python examples/finetune.py [FOLDER_OR_HUB_ID] [--text FILE ...] [--out FOLDER]
"""

import argparse
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoTokenizer, Trainer, TrainingArguments, set_seed

import qmoe

ROOT = Path(__file__).resolve().parents[1]
WINDOW = 256  # tokens
PROMPT = "The experts of a model"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", default=str(ROOT / "examples" / "tiny-moe"))
    parser.add_argument(
        "--weights", choices=("int8", "fp8"), default="int8", help="of a model in 16 bit"
    )
    parser.add_argument("--text", nargs="+", type=Path, default=sorted(ROOT.glob("docs/*.md")))
    parser.add_argument("--out", default="finetuned", help="where the adapter goes")
    parser.add_argument("--steps", type=int, default=150, help="of the optimizer")
    parser.add_argument("--rank", type=int, default=8)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    set_seed(0)
    cuda = torch.cuda.is_available()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    dtype = "auto" if cuda else "float32"
    converted = hasattr(AutoConfig.from_pretrained(arguments.model), "quantization_config")
    weights = None if converted else arguments.weights
    model = qmoe.load(arguments.model, weights=weights, dtype=dtype)
    text = "\n".join(file.read_text(encoding="utf-8") for file in arguments.text)
    held_out = text[len(text) * 9 // 10 :]
    ids = tokenizer(text[: -len(held_out)], add_special_tokens=False)["input_ids"]
    windows = [ids[i : i + WINDOW] for i in range(0, len(ids) - WINDOW, WINDOW)]
    if not windows:
        sys.exit(f"--text: {len(ids)} tokens to learn from; more than {WINDOW} are needed")

    config = LoraConfig(
        r=arguments.rank,
        lora_alpha=2 * arguments.rank,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, config)
    model.print_trainable_parameters()
    before = qmoe.perplexity(model, tokenizer, held_out, window=WINDOW)
    training = TrainingArguments(
        arguments.out,
        max_steps=arguments.steps,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=arguments.steps // 10,
        logging_steps=max(1, arguments.steps // 10),
        save_strategy="no",
        report_to="none",
        use_cpu=not cuda,
    )
    rows = [{"input_ids": window, "labels": window} for window in windows]
    Trainer(model, training, train_dataset=rows).train()

    model.eval()
    after = qmoe.perplexity(model, tokenizer, held_out, window=WINDOW)
    print(f"perplexity of text that was held out: {before:.1f} before, {after:.1f} after")
    print(qmoe.generate(model, tokenizer, PROMPT, max_new_tokens=48, do_sample=False).texts[0])
    model.save_pretrained(arguments.out)
    print(f"the adapter is in {arguments.out}; to make it a part of the model:")
    command = f"qmoe merge {arguments.model} {arguments.out} -o MERGED"
    print(f"{command} --weights {arguments.weights}")


if __name__ == "__main__":
    main()
