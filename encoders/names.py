"""What is known of encoders before one is loaded: choices of --tokens, OpenAI's names, hashes of files."""

import hashlib
from pathlib import Path

from utils.cli import nearest
from utils.files import sha256

POOLED, PATCHES = "pooled", "patches"  # of --tokens
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".npz")  # of weights files; the first that a folder has counts
OPENAI_NAMES = {  # name -> SHA-256 of its file, which the clip package checks
    "RN50": "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762",
    "RN101": "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599",
    "RN50x4": "7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd",
    "RN50x16": "52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa",
    "RN50x64": "be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c",
    "ViT-B/32": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    "ViT-B/16": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
    "ViT-L/14": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
    "ViT-L/14@336px": "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
}


def openai_sha256(name):
    """Return the SHA-256 of the file that an OpenAI name stands for; None for other names."""
    return OPENAI_NAMES.get(str(name))


def check_openai(name):
    """Refuse what is neither an OpenAI name nor a file; raises ValueError."""
    if openai_sha256(name) is None and not Path(name).is_file():
        hint = nearest(name, OPENAI_NAMES)
        raise ValueError(
            f"--clip_model_type {name} is neither a file nor one of {', '.join(OPENAI_NAMES)}{hint}; other libraries' "
            f"are open_clip:ARCH/TAG, hf-hub:ORG/REPO, timm:NAME, hf:ORG/REPO"
        )


def folder_sha256(folder):
    """Return the SHA-256 of a folder's weights file, or, of several files, of their hashes; None: it has no file."""
    found = (sorted(Path(folder).glob(f"*{suffix}")) for suffix in SUFFIXES)
    hashes = [sha256(file) for file in next(filter(None, found), ())]
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest() if len(hashes) > 1 else next(iter(hashes), None)
