"""Ask a model in a directory, with plain transformers: nothing here knows of lorafold.

python examples/ask.py .demo/merged "What is the capital of France?"
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

Token = int


def prompt(tokenizer: Any, question: str) -> list[Token]:
    """The tokens of `question` as the model's chat template puts it, up to where the answer begins."""
    chat = [{"role": "system", "content": "Answer in two short sentences."}, {"role": "user", "content": question}]
    return list(tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"])


def answer(model: Any, tokenizer: Any, question: str, max_tokens: int = 60) -> str:
    """What `model` says to `question`, taking the likeliest token each time; an answer that was cut off ends in ``…``."""
    import torch

    tokens = torch.tensor([prompt(tokenizer, question)])  # (1, tokens of the prompt)
    whole = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=max_tokens, do_sample=False, use_cache=True
    )
    said = whole[0, tokens.shape[1] :]
    cut_off = said[-1] != tokenizer.eos_token_id
    return str(tokenizer.decode(said, skip_special_tokens=True)).strip() + " …" * bool(cut_off)


def ask(directory: Path, questions: list[str]) -> list[str]:
    """The answers of the model in `directory`, which is loaded as anyone would."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    return [answer(model, tokenizer, question) for question in questions]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Ask a model in a directory.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("questions", nargs="+", metavar="QUESTION")
    parser.add_argument("--json", action="store_true", help="print the answers as a JSON list")
    args = parser.parse_args()
    answers = ask(args.directory, args.questions)
    if "lorafold" in sys.modules:
        raise SystemExit("lorafold was imported: this was to be plain transformers")
    print(json.dumps(answers) if args.json else "\n\n".join(answers))
