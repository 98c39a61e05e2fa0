"""FedAwS: federated averaging with spreadout.

Felix X. Yu, Ankit Singh Rawat, Aditya Krishna Menon and Sanjiv Kumar, "Federated Learning with Only Positive
Labels", ICML 2020: a comparison of the FedSS paper (Waghmare et al., arXiv:2203.04888).

Clients do as in PosOnly. What would keep classes apart that no client holds together is done by the server,
which pushes class rows that are near to each other apart: server/spreadout.py.
"""

from .method import Method
from .pos_only import request

FEDAWS = Method(
    name="fedaws",
    label="FedAwS",
    summary="Each client receives the rows of its own classes only; after each round the server pushes the "
    "rows of classes that are too near to each other apart.",
    paper='Yu et al., "Federated Learning with Only Positive Labels", 2020',
    request=request,
    options=("spreadout_weight", "spreadout_margin", "spreadout_neighbours", "spreadout_rows"),
    spreads=True,
)
