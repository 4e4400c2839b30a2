"""Real weights and data that programs read, from the hub where it is reached or a folder, checked by SHA-256.

    python experiments/assets.py DIR                 # take what the hub has, check what lies there, list the rest
    python experiments/assets.py DIR --from OTHER    # copy from another folder instead

A program that needs an asset asks `asset`, which gives its folder or says what is missing and where it comes from.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

from rankfold.errors import InputError
from rankfold.fingerprint import file_digest


class Asset(NamedTuple):
    """Files of one folder."""

    hub: str
    """Name of the model on the hub that holds these very files; empty where none does."""
    origin: str
    """Where they come from, for people."""
    files: Mapping[str, str]
    """SHA-256 by name."""


ASSETS: dict[str, Asset] = {
    "weights/all-MiniLM-L6-v2": Asset(
        "sentence-transformers/all-MiniLM-L6-v2",
        "the model of this name on the hub (Apache-2.0)",
        {
            "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
            "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
            "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
        },
    ),
    "weights/all-MiniLM-L6-v2-sst2-head": Asset(
        "",
        "a head for it, trained for this project on 10,000 rows of SST-2",
        {
            "config.json": "0514187a557adadc96dff4ec2288b2149395effaf50d70465b80a0b7d6d50662",
            "delta.safetensors": "39e82806df677e0f570e5fad98deb36eb77d6ac4b298f89b8b4977d4d6d70e1d",
        },
    ),
    "weights/stories260K": Asset(
        "",
        "karpathy/tinyllamas on the hub, converted to LlamaForCausalLM (MIT)",
        {
            "config.json": "ad24752e25ec1fdea6a978fe6d314e11761b472ea97e334bc742b79bb2ffd684",
            "generation_config.json": "1113738beda64787778c7058b7689d0b4fc2e402c0c5b552916168a0e551a393",
            "model.safetensors": "407a7c581bdd66972383ce9ad24857713fb98786d06ea564a2fe9b34ebe77dfd",
            "tokenizer.json": "a250f5518e5ca64dde69559f9ec616b3b6d44daa4baf1690d2cb639c456d8012",
            "tokenizer_config.json": "a32c88a67297bb9c99d8240afc75b2fe99869ae991cbcc1b0d1aacb91d32bb6b",
        },
    ),
    "models": Asset(
        "",
        "GGUF files of HuggingFaceTB/SmolLM2-135M-Instruct (Q4_1) and Qwen/Qwen2.5-Coder-0.5B-Instruct (Q4_K_M; both "
        "Apache-2.0), under these names",
        {
            "SmolLM2-135M-Instruct.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            "Qwen2.5-Coder-0.5B-Instruct.gguf": "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        },
    ),
    "data/tinystories": Asset(
        "",
        "197 KB of the training split of roneneldan/TinyStories (CDLA-Sharing-1.0)",
        {
            "tinystories_sample.txt": "727e8b228375be3075114c20729c93ed6e81ae5d8fe7faf7cb54b304f0322d70",
        },
    ),
    "data/sst2": Asset(
        "",
        "the validation split of GLUE's SST-2, 872 rows",
        {
            "sst2_validation.jsonl.gz": "a4e3f10f4a4c32b0b751273ea627663c36598d24ec723bfd4c421669db3f60b7",
        },
    ),
    "data/wikitext2": Asset(
        "",
        "WikiText-2 of Salesforce/wikitext (CC-BY-SA-3.0)",
        {
            "wiki.test.raw": "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08",
            "wiki.valid.tokens": "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
        },
    ),
    "data/humaneval": Asset(
        "",
        "openai/human-eval, data/HumanEval.jsonl.gz (MIT)",
        {
            "HumanEval.jsonl.gz": "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef",
        },
    ),
    "data/mbpp": Asset(
        "",
        "google-research, mbpp/mbpp.jsonl (CC-BY-4.0)",
        {
            "mbpp.jsonl": "ccf64ceae9c5403bf50a044cb6d505bfd2a2963ee58338ba268fd65beab92a9f",
        },
    ),
}
"""By place within a folder of assets."""


@cache
def asset(name: str, folder: Path | None) -> Path:
    """The folder of an asset, its files checked; what the hub has is put there if it is missing.

    Args:
        name: A key of `ASSETS`.
        folder: The folder of assets that was given.

    Raises:
        ValueError: If a file is missing and the hub does not have it or is not reached, or holds something else.
    """
    if folder is None:
        raise InputError(f"{name}: this needs real weights or data ({ASSETS[name].origin}): give their folder.")
    place = folder / name
    for file, digest in ASSETS[name].files.items():
        if not (place / file).is_file():
            _download(name, file, place)
        found = file_digest(place / file)
        if found != digest:
            raise InputError(
                f"{place / file}: must have the SHA-256 {digest[:16]}..., but has {found[:16]}...: it is another file "
                f"than the published numbers were measured on ({ASSETS[name].origin})."
            )
    return place


def _download(name: str, file: str, place: Path) -> None:
    entry = ASSETS[name]
    if not entry.hub:
        raise InputError(f"{place / file}: missing, and not on the hub in this form. It is {entry.origin}.")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        source = hf_hub_download(entry.hub, file)
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise InputError(f"{place / file}: missing, and the hub is not reached for {entry.hub} ({error}).") from error
    place.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, place / file)


def main() -> None:
    """Gather and check all assets; exit code 1 where one is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--from", dest="other", type=Path, help="a folder that holds them already")
    arguments = parser.parse_args()
    missing = 0
    for name, entry in ASSETS.items():
        for file in entry.files if arguments.other else ():
            if (arguments.other / name / file).is_file() and not (arguments.folder / name / file).exists():
                (arguments.folder / name).mkdir(parents=True, exist_ok=True)
                shutil.copyfile(arguments.other / name / file, arguments.folder / name / file)
        try:
            asset(name, arguments.folder)
            print(f"{name}: {len(entry.files)} files, checked")
        except InputError as error:
            missing += 1
            print(f"{name}: {error}")
    raise SystemExit(missing > 0)


if __name__ == "__main__":
    main()
