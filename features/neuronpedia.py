"""The address at which Neuronpedia shows the features of a public SAE.

Neuronpedia hosts few SAEs of each layer, and feature numbers differ between SAEs of different sparsity. So the address
is known only for the SAEs in neuronpedia.json, which are those of SAELens's index; the tests compare the two. For each
series of SAEs the file holds

- `gemma_scope`: by repository and width, the average_l0 of the hosted SAE of layer 0, 1, ...; null for no SAE;
- `gemma_scope_2`: by model, the layers with a hosted SAE, which reads resid_post and has medium sparsity;
- `llama_scope`: the number of layers, and Neuronpedia's names of sites and widths.
"""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any


def neuronpedia_url(path: str) -> str | None:
    """The address of an SAE's features, without the feature's number, from its `sae.path`; None if it is not known."""
    page = gemma_scope_page(path) or gemma_scope_2_page(path) or llama_scope_page(path)
    return f"https://www.neuronpedia.org/{page}" if page else None


@cache
def hosted_saes() -> dict[str, Any]:
    return json.loads(Path(__file__).with_suffix(".json").read_text())


def gemma_scope_page(path: str) -> str | None:
    match = re.search(r"gemma-scope-((\d+b)-(pt|it)-(\w+))/layer_(\d+)/width_(\w+)/average_l0_(\d+)(/|$)", path)
    if not match:
        return None
    repository, size, kind, site, layer, width, l0, _ = match.groups()
    hosted_l0 = hosted_saes()["gemma_scope"].get(repository, {}).get(width, [])
    if int(layer) >= len(hosted_l0) or str(hosted_l0[int(layer)]) != l0:
        return None
    return f"gemma-2-{size}{'-it' if kind == 'it' else ''}/{layer}-gemmascope-{site}-{width}"


def gemma_scope_2_page(path: str) -> str | None:
    match = re.search(r"gemma-scope-2-(\w+-(?:pt|it))/resid_post/layer_(\d+)_width_(\d+k)_l0_medium(/|$)", path)
    if not match:
        return None
    model, layer, width, _ = match.groups()
    if int(layer) not in hosted_saes()["gemma_scope_2"].get(model, []):
        return None
    return f"gemma-3-{model.removesuffix('-pt')}/{layer}-gemmascope-2-res-{width}"


def llama_scope_page(path: str) -> str | None:
    match = re.search(r"Llama3_1-8B-Base-L(\d+)([RM])-(8|32)x(/|$)", path)
    hosted = hosted_saes()["llama_scope"]
    if not match or int(match[1]) >= hosted["layers"]:
        return None
    return f"llama3.1-8b/{match[1]}-llamascope-{hosted['sites'][match[2]]}-{hosted['widths'][match[3]]}"
