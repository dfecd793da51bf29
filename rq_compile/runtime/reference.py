"""The checkpoint, run by transformers, with the same interface as an engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rq_compile.runtime.language_model import is_recomputed

if TYPE_CHECKING:
    from rq_compile.architectures.model import Model


class Reference:
    """A transformers model in fp32 on the CPU, on ``threads`` threads (default: see ``torch_threads``)."""

    def __init__(
        self, model: Any, threads: int | None = None, end_of_text: Sequence[int] = (), decoder_start: int | None = None
    ) -> None:
        """``end_of_text`` and ``decoder_start``: the tokens at which generation ends and with which a decoder begins."""
        self.model = model
        self.threads = threads
        self.end_of_text = list(end_of_text)
        self.decoder_start = decoder_start

    @classmethod
    def load(cls, model: Model, threads: int | None = None) -> Reference:
        from rq_compile.architectures.load import load_model

        return cls(load_model(model), threads, model.end_of_text, model.decoder_start)

    @property
    def encoder_decoder(self) -> bool:
        return bool(self.model.config.is_encoder_decoder)

    def logits(
        self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None, decoder_input_ids: np.ndarray | None = None
    ) -> np.ndarray:
        """As :meth:`rq_compile.runtime.engine.Engine.logits`."""
        import torch

        ids = torch.from_numpy(np.asarray(input_ids, dtype=np.int64))
        mask = torch.ones_like(ids) if attention_mask is None else torch.from_numpy(np.asarray(attention_mask, dtype=np.int64))
        arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        if decoder_input_ids is not None:
            arguments["decoder_input_ids"] = torch.from_numpy(np.asarray(decoder_input_ids, dtype=np.int64))
        return self._run(self.model, **arguments).logits.float().numpy()

    def generate(self, prompt_ids: Sequence[int], max_tokens: int, *, stop: bool = True) -> Iterator[int]:
        """As :meth:`rq_compile.runtime.engine.Engine.generate`, with transformers' KV cache."""
        import torch

        from rq_compile.architectures.rope import recomputed_beyond

        ids = torch.tensor([list(prompt_ids)], dtype=torch.int64)
        key, encoded = "input_ids", {}
        if self.encoder_decoder:
            encoded = {"encoder_outputs": self._run(self.model.get_encoder(), input_ids=ids)}
            key, ids = "decoder_input_ids", torch.tensor([[self.decoder_start or 0]])
        beyond = recomputed_beyond(self.model.config)
        state: Any = None
        start = 0
        for _ in range(max_tokens):
            if is_recomputed(beyond, start, ids.shape[1]):
                state, start = None, 0
            # MiniMax cannot tell from its cache how many tokens it has read.
            positions = {} if self.encoder_decoder else {"position_ids": torch.arange(start, ids.shape[1])[None]}
            now = {key: ids[:, start:], **positions, **encoded}
            outputs = self._run(self.model, **now, past_key_values=state, use_cache=True)
            state = outputs.past_key_values
            token = int(outputs.logits[0, -1].argmax())
            if stop and token in self.end_of_text:
                return
            yield token
            start, ids = ids.shape[1], torch.cat([ids, torch.tensor([[token]])], dim=1)

    def _run(self, module: Any, **arguments: Any) -> Any:
        import torch

        from rq_compile.architectures.load import torch_threads
        from rq_compile.architectures.quiet import quiet_transformers

        with torch_threads(self.threads), quiet_transformers(), torch.inference_mode():
            return module(**arguments)
