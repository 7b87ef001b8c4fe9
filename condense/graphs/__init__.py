"""Graph classification: real graphs, distilled sets of graphs, and their evaluation. Needs the extra ``graph``."""

from condense.graphs.arrays import GraphArrays, import_pyg
from condense.graphs.distillation import GraphRun, check_graph_request, distill_graphs
from condense.graphs.evaluation import evaluate_graphs, format_graph_record
from condense.graphs.graph_set import GRAPHS_FORMAT, MAX_DEPTH, POOLS, GraphSet, SyntheticGraphs
from condense.graphs.networks import NETWORKS, GraphNetwork
from condense.graphs.protocol import GRAPH_PROTOCOLS, GraphProtocol, get_graph_protocol
from condense.graphs.task import GraphOptions, GraphTask, is_graph_data, load_graph_task

__all__ = [
    "GRAPHS_FORMAT",
    "GRAPH_PROTOCOLS",
    "MAX_DEPTH",
    "NETWORKS",
    "POOLS",
    "GraphArrays",
    "GraphNetwork",
    "GraphOptions",
    "GraphProtocol",
    "GraphRun",
    "GraphSet",
    "GraphTask",
    "SyntheticGraphs",
    "check_graph_request",
    "distill_graphs",
    "evaluate_graphs",
    "format_graph_record",
    "get_graph_protocol",
    "import_pyg",
    "is_graph_data",
    "load_graph_task",
]
