"""A federation small enough to work out by hand: 7 classes, 5 clients of unequal size, 6x6 images, D = 4."""

import torch
from torch import nn

from fedss_kernels.federated import Config
from fedss_kernels.federated.data import FederatedData

CLASSES_HELD = ((0, 1), (1, 2, 3), (0, 3), (2, 4), (1, 4, 5))  # class 6 is held by nobody
IMAGES_OF_EACH = (3, 2, 4, 1, 2)  # of each of its classes, by client
UNTRAINED = "test images of classes of which no client has an image: 3 of 21"  # as a run says
NUM_CLASSES, DIM, PIXELS = 7, 4, 36
NUM_PARAMETERS = PIXELS * DIM + DIM  # of the linear model


def tiny_data(task: str = "classification") -> FederatedData:
    labels, clients = [], []
    for held, each in zip(CLASSES_HELD, IMAGES_OF_EACH, strict=True):
        first = len(labels)
        labels += [label for label in held for _ in range(each)]
        clients.append(torch.arange(first, len(labels)))
    generator = torch.Generator().manual_seed(0)
    prototypes = torch.randint(0, 206, (NUM_CLASSES, 1, 6, 6), generator=generator)

    def draw(classes: torch.Tensor) -> torch.Tensor:
        noise = torch.randint(0, 50, (len(classes), 1, 6, 6), generator=generator)
        return (prototypes[classes] + noise).to(torch.uint8)

    train, test = torch.tensor(labels), torch.arange(NUM_CLASSES).repeat(3)
    return FederatedData(
        name="tiny",
        images=draw(train),
        labels=train,
        clients=tuple(clients),
        client_names=tuple(f"client {k}" for k in range(len(clients))),
        test_images=draw(test),
        test_labels=test,
        num_classes=NUM_CLASSES,
        class_names=tuple(f"class {j}" for j in range(NUM_CLASSES)),
        task=task,
        test_clients=_testers(test) if task == "classification" else (),
    )


def _testers(labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Each class' test images in turn to those who hold it; nobody has those of class 6."""
    rows: list[list[int]] = [[] for _ in CLASSES_HELD]
    for i, label in enumerate(labels.tolist()):
        holders = [k for k, held in enumerate(CLASSES_HELD) if label in held]
        if holders:
            rows[holders[i // NUM_CLASSES % len(holders)]].append(i)
    return tuple(torch.tensor(of, dtype=torch.int64) for of in rows)


def tiny_model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, DIM))


def tiny_config(**options) -> Config:
    settings = {"rounds": 3, "cohort": 3, "batch_size": 3, "client_lr": 0.2, "warmup_rounds": 0}
    settings |= {
        "num_negatives": 2,
        "lr_decay": "constant",
        "embedding_dim": DIM,
        "scale": 5.0,
        "eval_every": 2,
    }
    return Config(**(settings | {"weight_init_scale": 0.5} | options))
