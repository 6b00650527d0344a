"""The paper's network for QM9, on the graphs that torch_geometric makes of molecules."""

import importlib
from typing import Any

import torch
from torch import Tensor, nn

PYG_WIDTH = 64
PYG_ROUNDS = 3
PYG_PIECE = 128
"""Molecules that the network takes at a time: each of their pairs of atoms needs a matrix."""


def complete_graph(molecule: Any) -> Any:
    """Return the molecule with an edge between any two atoms: what bond they have, and their distance.

    Args:
        molecule: A `torch_geometric.data.Data` with x, edge_index, pos, and edge_attr of shape (bonds, kinds).

    Returns:
        One with x, edge_index and edge_attr of shape (n * (n - 1), kinds + 1).
    """
    atoms, kinds = molecule.num_nodes, molecule.edge_attr.shape[1]
    bonds = molecule.edge_attr.new_zeros(atoms, atoms, kinds)
    bonds[molecule.edge_index[0], molecule.edge_index[1]] = molecule.edge_attr
    source, target = (~torch.eye(atoms, dtype=torch.bool)).nonzero(as_tuple=True)
    distance = (molecule.pos[source] - molecule.pos[target]).norm(dim=1, keepdim=True)
    edges = torch.cat([bonds[source, target], distance], dim=1)
    return type(molecule)(x=molecule.x, edge_index=torch.stack([source, target]), edge_attr=edges)


class MessagePassing(nn.Module):
    """The paper's trunk for QM9 (Gilmer et al., 2017): molecules by their numbers -> 64 features.

    It takes numbers, so that a batch is a tensor as in every other problem, and looks the graphs up.
    """

    def __init__(self, graphs: Any) -> None:
        """Make the layers for these graphs.

        Args:
            graphs: A data set of torch_geometric; `graphs[i]` as `complete_graph` takes it.
        """
        super().__init__()
        layers = importlib.import_module("torch_geometric.nn")
        self.graphs = graphs
        self.collate = importlib.import_module("torch_geometric.data").Batch.from_data_list
        example = complete_graph(graphs[0])
        matrices = nn.Sequential(
            nn.Linear(example.edge_attr.shape[1], 2 * PYG_WIDTH), nn.ReLU(), nn.Linear(2 * PYG_WIDTH, PYG_WIDTH**2)
        )
        self.embedding = nn.Linear(example.x.shape[1], PYG_WIDTH)
        self.convolution = layers.NNConv(PYG_WIDTH, PYG_WIDTH, matrices, aggr="mean")
        self.memory = nn.GRU(PYG_WIDTH, PYG_WIDTH)
        self.pool = layers.Set2Set(PYG_WIDTH, processing_steps=3)
        self.last = nn.Linear(2 * PYG_WIDTH, PYG_WIDTH)

    def forward(self, numbers: Tensor) -> Tensor:
        """(N,) -> (N, 64)."""
        return torch.cat([self._features(piece) for piece in torch.split(numbers, PYG_PIECE)])

    def _features(self, numbers: Tensor) -> Tensor:
        batch = self.collate([complete_graph(self.graphs[number]) for number in numbers.tolist()]).to(numbers.device)
        nodes = torch.relu(self.embedding(batch.x))
        state = nodes.unsqueeze(0)
        for _ in range(PYG_ROUNDS):
            messages = torch.relu(self.convolution(nodes, batch.edge_index, batch.edge_attr))
            nodes, state = self.memory(messages.unsqueeze(0), state)
            nodes = nodes.squeeze(0)
        return torch.relu(self.last(self.pool(nodes, batch.batch)))
