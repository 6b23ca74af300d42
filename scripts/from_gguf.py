"""Write the model in a GGUF file in the Hub's format: python scripts/from_gguf.py FILE.gguf OUT [--dtype bfloat16]

OUT gets the weights (dequantised), the tokenizer with its chat template, and the generation settings: a directory that
`model=OUT` takes, and `from_pretrained` and vLLM too. transformers says which architectures it reads; it needs the
package gguf (pip install gguf). At the end the model writes one greedy completion, for a person to read.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402
from transformers.utils import logging  # noqa: E402

from modeling.weights import write_weights  # noqa: E402
from utils import UserError, atomic_write, console  # noqa: E402

PROMPT = "What is the capital of France?"


def convert(file: Path, out: Path, dtype: torch.dtype) -> str:
    """Write the directory `out`, and give a greedy completion by the model as read back from it.

    Raises UserError where `file` is no GGUF file that transformers reads, or `out` is there already.
    """
    if importlib.util.find_spec("gguf") is None:
        raise UserError("this needs the package gguf: pip install gguf")
    if not file.is_file() or file.open("rb").read(4) != b"GGUF":
        raise UserError(f"{file}: not a GGUF file")
    if out.exists():
        raise UserError(f"{out} is there already")
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise UserError(f"{file}: transformers cannot read it ({str(error).splitlines()[0]})") from error
    with atomic_write(out) as part:
        part.mkdir()
        write_weights(model, part, ["hub"])
        tokenizer.save_pretrained(part)
        written = AutoModelForCausalLM.from_pretrained(part, dtype=dtype)
        return greedy_completion(written, AutoTokenizer.from_pretrained(part))


def greedy_completion(model: torch.nn.Module, tokenizer: object) -> str:
    turns = [{"role": "user", "content": PROMPT}]
    chat = tokenizer.chat_template is not None
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) if chat else PROMPT
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=not chat).input_ids
    new = model.generate(ids, max_new_tokens=32, do_sample=False)[0, ids.shape[1] :]
    return str(tokenizer.decode(new, skip_special_tokens=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, metavar="FILE.gguf")
    parser.add_argument("out", type=Path, metavar="OUT", help="a directory that is not there yet")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the weights written")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        answer = convert(arguments.file, arguments.out, getattr(torch, arguments.dtype))
    except UserError as error:
        console.print(str(error), style="red", markup=False)
        sys.exit(2)
    console.print(f"{PROMPT} {answer}\nwritten to {arguments.out}: model={arguments.out}", markup=False)


if __name__ == "__main__":
    main()
