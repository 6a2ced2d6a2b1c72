"""What the library alone must be able to do, run in an environment without the extras: ``python library.py``."""

import torch

import pikv
from pikv.models import load_demo


def main():
    model, tokenizer = load_demo()
    inputs = tokenizer("the cat sat on the mat . " * 20, return_tensors="pt")
    for name in ["duo:0.5", "eplb:0.5", "snapkv:0.5"]:
        cache = pikv.PiKVCache(model.config)
        with pikv.get_press(name)(model), torch.no_grad():
            model(**inputs, past_key_values=cache)
            model.generate(**inputs, max_new_tokens=2)
        assert cache.compression_ratio > 0.3, cache
    print("pikv without extras:", pikv.__file__)


if __name__ == "__main__":
    main()
