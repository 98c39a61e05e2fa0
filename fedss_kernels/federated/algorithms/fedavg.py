"""FedAvg: federated averaging of the whole model, to be personalised afterwards.

H. Brendan McMahan, Eider Moore, Daniel Ramage, Seth Hampson and Blaise Agüera y Arcas,
"Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017, Algorithm 1.

It is FullSoftmax under the name that papers on personalisation give it; there the server has no momentum
(`server_momentum` 0).
"""

from dataclasses import replace

from .full_softmax import FULL_SOFTMAX

FEDAVG = replace(
    FULL_SOFTMAX,
    name="fedavg",
    label="FedAvg",
    summary="Clients train the whole model, net and class rows, and the server averages what they send back: "
    "FullSoftmax under the name that it has beside personalised methods.",
)
