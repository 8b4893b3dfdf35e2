"""What is in a file of LiteRT-LM: a program for the Python of its environment.

Arguments: `draft`, the file, a folder to unpack it into, and a file of safetensors with the inputs
of the drafter, each with the name of its call before its own, to which the outputs are added; or
`tokens`, the file, and a JSON list of texts, whose tokens are printed as JSON.
"""

import json
import sys
from pathlib import Path


def draft(bundle: str, folder: str, calls: str) -> None:
    from ai_edge_litert.interpreter import Interpreter
    from litert_lm_builder import litertlm_builder
    from safetensors.numpy import load_file, save_file

    litertlm_builder.LitertLmFileBuilder.unpack(bundle, folder)
    (path,) = Path(folder).rglob("*mtp_drafter*.tflite")
    run = Interpreter(model_path=str(path)).get_signature_runner("draft")
    found = load_file(calls)
    for call in sorted({name.partition(".")[0] for name in found}):
        inputs = {k.partition(".")[2]: v for k, v in found.items() if k.startswith(f"{call}.")}
        found |= {f"{call}.out.{name}": array for name, array in run(**inputs).items()}
    save_file(found, calls)


def tokens(bundle: str, texts: str) -> None:
    import litert_lm

    engine = litert_lm.Engine(bundle, backend=litert_lm.Backend.CPU(), cache_dir=":nocache")
    ids = [engine.tokenize(text) for text in json.loads(texts)]
    found = {"ids": ids, "stops": engine.eos_token_ids, "first": engine.bos_token_id}
    print(json.dumps(found), flush=True)
    engine.close()


if __name__ == "__main__":
    what, *arguments = sys.argv[1:]
    if what == "draft":
        draft(*arguments)
    else:
        tokens(*arguments)
