"""Where Neuronpedia shows the features of a public SAE.

Of each layer it hosts one SAE under a plain name and few others, so the layer alone does not do: a number means
another feature in an SAE of another sparsity. The tables are from SAELens's index (sae-lens 6.54.12), which the tests
compare them with. An SAE that is not in them has no page.
"""

import re

GEMMA_SCOPE = {  # repository and width: average_l0 of the one that is hosted, of layers 0, 1, ... (-: none is)
    "2b-pt-res 16k": ("105 102 141 59 124 68 70 69 71 73 77 80 82 84 84 78 78 77 74 73 71 70 72 75 73 116"),
    "2b-pt-res 65k": ("73 121 77 89 89 105 107 107 111 118 128 70 72 75 73 127 128 125 116 115 114 111 116 123 124 93"),
    "2b-pt-mlp 16k": ("119 105 95 95 85 114 133 60 136 88 110 98 108 112 97 80 72 68 106 109 109 113 121 128 73 126"),
    "2b-pt-mlp 65k": ("72 127 134 68 66 86 101 115 110 77 95 88 96 98 89 72 66 136 88 88 88 86 92 102 128 107"),
    "9b-pt-res 16k": (
        "129 69 67 90 91 77 93 92 99 100 113 118 130 132 67 131 75 73 71 132 68 129 123 120 114 114 116 118 "
        "119 119 120 114 111 114 114 120 120 124 128 131 125 113"
    ),
    "9b-pt-res 131k": (
        "41 56 70 103 101 94 120 119 72 75 84 88 96 99 105 103 121 117 113 110 114 109 105 101 97 96 97 96 98 "
        "97 95 92 88 91 89 94 93 96 101 99 94 84"
    ),
    "9b-it-res 16k": ("- - - - - - - - - 88 - - - - - - - - - - 91 - - - - - - - - - - 76"),
    "9b-it-res 131k": ("- - - - - - - - - 121 - - - - - - - - - - 81 - - - - - - - - - - 109"),
    "27b-pt-res 131k": ("- - - - - - - - - - 106 - - - - - - - - - - - 82 - - - - - - - - - - - 72"),
}
GEMMA_SCOPE_2 = {  # model: layers that are hosted, of resid_post at medium sparsity
    "270m-pt": (5, 9, 12, 15),
    "270m-it": (5, 9, 12, 15),
    "1b-pt": (7, 13, 17, 22),
    "1b-it": (7, 13, 17, 22),
    "4b-pt": (9, 17, 22, 29),
    "4b-it": (9, 17, 22, 29),
    "12b-pt": (12, 24, 31, 41),
    "27b-it": (16, 31, 40, 53),
}
SITES = {"R": "res", "M": "mlp"}
WIDTHS = {"8": "32k", "32": "131k"}


def neuronpedia_url(path: str) -> str | None:
    """The address of an SAE's features, without their number, from `sae.path`; None where none is known."""
    found = gemma_scope(path) or gemma_scope_2(path) or llama_scope(path)
    return f"https://www.neuronpedia.org/{found}" if found else None


def gemma_scope(path: str) -> str | None:
    place = re.search(r"gemma-scope-((\d+b)-(pt|it)-(\w+))/layer_(\d+)/width_(\w+)/average_l0_(\d+)(/|$)", path)
    if not place:
        return None
    repository, size, kind, site, layer, width, l0, _ = place.groups()
    hosted = GEMMA_SCOPE.get(f"{repository} {width}", "").split()
    if int(layer) >= len(hosted) or hosted[int(layer)] != l0:
        return None
    return f"gemma-2-{size}{'-it' if kind == 'it' else ''}/{layer}-gemmascope-{site}-{width}"


def gemma_scope_2(path: str) -> str | None:
    place = re.search(r"gemma-scope-2-(\w+-(?:pt|it))/resid_post/layer_(\d+)_width_(\d+k)_l0_medium(/|$)", path)
    if not place or int(place[2]) not in GEMMA_SCOPE_2.get(place[1], ()):
        return None
    return f"gemma-3-{place[1].removesuffix('-pt')}/{place[2]}-gemmascope-2-res-{place[3]}"


def llama_scope(path: str) -> str | None:
    place = re.search(r"Llama3_1-8B-Base-L(\d+)([RM])-(8|32)x(/|$)", path)
    if not place or int(place[1]) > 31:
        return None
    return f"llama3.1-8b/{place[1]}-llamascope-{SITES[place[2]]}-{WIDTHS[place[3]]}"
