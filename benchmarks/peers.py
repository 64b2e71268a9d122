"""What other packages do with the same weights and prompt, in a process of their own; run by the growth table.

    PYTHON benchmarks/peers.py PEER FOLDER TOKENS ANSWER

TOKENS are the prompt's ids, with commas between them, and ANSWER is one id. Prints JSON. The interpreter needs what
requirements-peers.txt names and nothing of this package. Each peer is given the module of transformers, and is timed
beside plain forward passes of it.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

STEPS = 20
# A thing that takes this long once is not repeated.
PATIENCE = 10.0
ROUNDS = 5

Thing = Callable[[], Any]


def transformer_lens(gpt2: Any, tokenizer: Any, ids: Any, answer: int) -> Thing:
    """Stack what every FFN neuron writes at the last position, and take each one's part in the answer's logit."""
    import torch
    from transformer_lens import TransformerBridge

    bridge = TransformerBridge.boot_transformers(gpt2.name_or_path, hf_model=gpt2, tokenizer=tokenizer, device="cpu")

    def run() -> Any:
        with torch.no_grad():
            _, cache = bridge.run_with_cache(ids)
            stack = cache.stack_neuron_results(-1, pos_slice=-1)
            return cache.logit_attrs(stack, tokens=torch.tensor([answer]), pos_slice=-1)[:, 0]

    return run


def captum(gpt2: Any, tokenizer: Any, ids: Any, answer: int) -> Thing:
    """Integrate gradients of log p(w) along the coefficients of one layer after the other."""
    import torch
    from captum.attr import LayerIntegratedGradients

    # The path starts at what the coefficients are in a prompt of unknown words.
    nothing = torch.full_like(ids, tokenizer.unk_token_id)

    def log_prob(tokens: Any) -> Any:
        return gpt2(tokens).logits[:, -1].log_softmax(-1)[:, answer]

    methods = [LayerIntegratedGradients(log_prob, block.mlp.act) for block in gpt2.transformer.h]

    def run() -> Any:
        return torch.stack([each.attribute(ids, nothing, n_steps=STEPS)[0, -1] for each in methods]).detach()

    return run


def knowledge_neurons(gpt2: Any, tokenizer: Any, ids: Any, answer: int) -> Thing:
    """Integrate gradients of p(w) along the coefficients of the last position, one layer after the other."""
    from knowledge_neurons import KnowledgeNeurons

    found = KnowledgeNeurons(gpt2, tokenizer, model_type="gpt", device="cpu")
    prompt, word = tokenizer.decode(ids[0]), tokenizer.decode([answer])
    return lambda: found.get_scores(prompt, word, batch_size=10, steps=STEPS, pbar=False)


PEERS: dict[str, tuple[str, Callable[..., Thing]]] = {
    "TransformerLens": ("transformer-lens", transformer_lens),
    "Captum": ("captum", captum),
    "knowledge-neurons": ("knowledge-neurons", knowledge_neurons),
}


class Passes:
    """Counts rows that go through the blocks, forward and backward."""

    def __init__(self, last_block: Any) -> None:
        self.forward = self.backward = 0
        last_block.register_forward_hook(self._seen)

    def _seen(self, _: Any, __: Any, output: Any) -> None:
        state = output[0] if isinstance(output, tuple) else output
        self.forward += len(state)
        if state.requires_grad:
            state.register_hook(self._returned)

    def _returned(self, gradient: Any) -> None:
        self.backward += len(gradient)


def main(name: str, folder: str, tokens: str, answer: str) -> None:
    """Time one peer and print what was found."""
    package, build = PEERS[name]
    try:
        versions = {each: version(each) for each in (package, "torch", "transformers")}
    except PackageNotFoundError as error:
        raise SystemExit(
            f"{error.name} is not installed; name an interpreter that has benchmarks/requirements-peers.txt"
        ) from None
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Then the process's own time is the time it takes, whoever else is busy.
    torch.set_num_threads(1)
    gpt2 = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([[int(token) for token in tokens.split(",")]])

    def plain() -> None:
        with torch.no_grad():
            gpt2(ids)

    def seconds_of(thing: Thing) -> float:
        start = time.process_time()
        thing()
        return time.process_time() - start

    plain()
    passes = Passes(gpt2.transformer.h[-1])
    thing = build(gpt2, tokenizer, ids, int(answer))
    start = time.process_time()
    scores = thing()
    first = time.process_time() - start
    counted = {"forward": passes.forward, "backward": passes.backward}
    pairs = [(seconds_of(plain), seconds_of(thing)) for _ in range(ROUNDS if first < PATIENCE / ROUNDS else 1)]
    before, after = zip(*pairs, strict=True)
    found = {"seconds": statistics.median(after), "plain": statistics.median(before), "rounds": len(pairs)}
    print(json.dumps(found | counted | {"scored": scores.numel(), "versions": versions}))


if __name__ == "__main__":
    main(*sys.argv[1:])
