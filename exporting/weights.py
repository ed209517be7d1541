"""The weights of ONNX graphs: laid out for matrix products, in fewer bits, each stored once for all graphs.

Axes: V vocabulary, E width of a language model, K inputs of a product, N its outputs, S numbers of a block, Q blocks of
a row.
"""

import hashlib

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, DefaultWeightOnlyQuantizer

INTERNAL = 1024  # bytes below which a tensor stays in its graph; larger ones go to the store
ALIGNMENT = 64  # of a stored tensor, in bytes
MICROSOFT = "com.microsoft"  # ONNX Runtime's own operators
# bits -> numbers of a block, whether the block is quantised symmetrically
BLOCKS = {8: (128, True), 4: (32, False)}
INT8_PRODUCTS = 4  # accuracy level: a row's activations are rounded to 8 bits, block by block, inside of the product


class Graph:
    """One ONNX graph with its weights in memory, found by name."""

    def __init__(self, model):
        """Take over an onnx.ModelProto."""
        self.model, self.nodes = model, list(model.graph.node)
        self.weights = {tensor.name: tensor for tensor in model.graph.initializer}

    def array(self, name):
        """Return a weight as an array, or None where `name` is no weight."""
        return numpy_helper.to_array(self.weights[name]) if name in self.weights else None

    def add(self, name, array):
        """Add a weight, unless it is there; returns its name."""
        if name not in self.weights:
            self.weights[name] = numpy_helper.from_array(np.ascontiguousarray(array), name)
        return name

    def finish(self):
        """Return the onnx.ModelProto, without the weights that no node reads any more."""
        used = {name for node in self.nodes for name in node.input}
        used |= {output.name for output in self.model.graph.output}
        graph = self.model.graph
        del graph.node[:], graph.initializer[:], graph.value_info[:]
        for node in self.nodes:
            del node.metadata_props[:]  # its line of Python: nine tenths of the file
        if not any(opset.domain == MICROSOFT for opset in self.model.opset_import):
            self.model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
        graph.node.extend(self.nodes)
        graph.initializer.extend(tensor for name, tensor in self.weights.items() if name in used)
        return self.model


def lay_out(graph):
    """Give every product with a weight the form x [.., K] times weight [K, N], and a tied table one weight.

    A language model with tied embeddings reads one table [V, E] for its input and output layers.
    """
    made, nodes = {}, []
    for node in graph.nodes:
        if node.op_type == "Transpose" and node.input[0] in graph.weights and _is_matrix(graph, node.input[0]):
            made[node.output[0]] = node.input[0]
        elif node.op_type == "Gemm" and _is_matrix(graph, node.input[1]):
            nodes += _split_gemm(graph, node)
        else:
            nodes.append(node)
    for name, source in made.items():
        graph.add(name, graph.array(source).T)
    graph.nodes = nodes


def _is_matrix(graph, name):
    return name in graph.weights and len(graph.weights[name].dims) == 2


def _split_gemm(graph, node):
    """Return a product, and a sum where there is a bias, in place of a Gemm of plain factors."""
    given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if given.get("alpha", 1) != 1 or given.get("beta", 1) != 1 or given.get("transA", 0):
        return [node]
    weight = node.input[1]
    if given.get("transB", 0):
        weight = graph.add(f"{weight}.T", graph.array(weight).T)
    if len(node.input) == 2:
        return [helper.make_node("MatMul", [node.input[0], weight], node.output)]
    product = f"{node.output[0]}.product"
    return [
        helper.make_node("MatMul", [node.input[0], weight], [product]),
        helper.make_node("Add", [product, node.input[2]], node.output),
    ]


def tables(graph, rows):
    """Return {embedding table [V, E]: the weight of a product that is its transpose, or None}.

    Args:
        rows: V.
    """
    names = {node.input[0] for node in graph.nodes if node.op_type == "Gather" and _is_matrix(graph, node.input[0])}
    found = {}
    for name in sorted(name for name in names if graph.weights[name].dims[0] == rows):
        table = graph.array(name)
        products = [
            node.input[1] for node in graph.nodes if node.op_type == "MatMul" and _is_matrix(graph, node.input[1])
        ]
        alike = [weight for weight in products if list(graph.weights[weight].dims) == list(table.T.shape)]
        found[name] = next((weight for weight in alike if np.array_equal(graph.array(weight), table.T)), None)
    return found


def tie(graph, rows):
    """Let a tied output layer read the embedding table itself, transposed; `rows`: V."""
    tied = {weight: table for table, weight in tables(graph, rows).items() if weight}
    for number, node in enumerate(graph.nodes):
        if node.op_type == "MatMul" and node.input[1] in tied:
            graph.nodes[number] = helper.make_node(
                "FusedMatMul", [node.input[0], tied[node.input[1]]], node.output, domain=MICROSOFT, transB=1
            )


def quantize(graph, bits, rows):
    """Quantise the weights of products, and the embedding table, to integers, block by block.

    Activations stay float32. Weights as wide as the vocabulary choose between tokens and always have 8 bits; a tied
    table is kept once.

    Args:
        bits: 8 or 4.
        rows: V; 0: there is no table.
    Source: ONNX Runtime's MatMulNBits and its quantiser.
    """
    packed, nodes, tied = {}, [], tables(graph, rows)

    def pack(name, weight):
        """Keep a weight [K, N] in blocks; returns (names of numbers [N, Q, S], scales, zero points; bits, S)."""
        if name not in packed:
            number = 8 if rows in weight.shape else bits
            size, symmetric = BLOCKS[number]
            config = DefaultWeightOnlyQuantConfig(block_size=size, is_symmetric=symmetric, bits=number)
            numbers, scales, zeros = DefaultWeightOnlyQuantizer(config).qbits_block_quant(
                np.ascontiguousarray(weight)  # it ignores strides
            )
            arrays = {f"int{number}": numbers, "scales": scales} | ({} if symmetric else {"zeros": zeros})
            packed[name] = [graph.add(f"{name}.{what}", array) for what, array in arrays.items()], number, size
        return packed[name]

    for node in graph.nodes:
        if node.op_type == "MatMul" and _is_matrix(graph, node.input[1]):
            weight = graph.array(node.input[1])
            names, number, size = pack(node.input[1], weight)
            nodes.append(helper.make_node(
                "MatMulNBits", [node.input[0], *names], node.output, domain=MICROSOFT,
                K=weight.shape[0], N=weight.shape[1], bits=number, block_size=size, accuracy_level=INT8_PRODUCTS,
            ))  # fmt: skip
        elif node.op_type == "Gather" and node.input[0] in tied:
            table = graph.array(node.input[0])
            names, *_ = pack(tied[node.input[0]] or node.input[0], table.T)
            nodes += _gather_blocks(graph, node, names, table.shape[1])
        else:
            nodes.append(node)
    graph.nodes = nodes


def _gather_blocks(graph, node, names, width):
    """Return the nodes that read rows [B, T, E] of a table kept in blocks of 8 bits; `width`: E."""
    (numbers, scales), out = names, node.output[0]
    blocks = graph.array(numbers).shape[1:]
    middle = graph.add("int8.middle", np.float32(128))
    each = graph.add("int8.each", np.array([-1]))
    shape = graph.add(f"{out}.shape", np.array([0, 0, np.prod(blocks)]))
    ends = [graph.add(f"{out}.{name}", np.array([value])) for name, value in (("from", 0), ("to", width), ("axis", 2))]
    return [
        helper.make_node("Gather", [numbers, node.input[1]], [f"{out}.rows"]),
        helper.make_node("Gather", [scales, node.input[1]], [f"{out}.row_scales"]),
        helper.make_node("Cast", [f"{out}.rows"], [f"{out}.numbers"], to=TensorProto.FLOAT),
        helper.make_node("Sub", [f"{out}.numbers", middle], [f"{out}.centred"]),
        helper.make_node("Unsqueeze", [f"{out}.row_scales", each], [f"{out}.block_scales"]),
        helper.make_node("Mul", [f"{out}.centred", f"{out}.block_scales"], [f"{out}.scaled"]),
        helper.make_node("Reshape", [f"{out}.scaled", shape], [f"{out}.padded"]),
        helper.make_node("Slice", [f"{out}.padded", *ends], [out]),
    ]


class Store:
    """A file beside the graphs that holds equal tensors once, whatever their names."""

    def __init__(self, path):
        """Begin a new file."""
        self.path, self.places, self.end = path, {}, 0
        path.write_bytes(b"")

    def save(self, model, path):
        """Write a graph, moving its larger tensors from the onnx.ModelProto into the store."""
        with open(self.path, "ab") as file:
            for tensor in model.graph.initializer:
                data = numpy_helper.to_array(tensor).tobytes()
                if len(data) >= INTERNAL:
                    place = self._place(file, data)
                    for field in ("raw_data", "float_data", "int32_data", "int64_data"):
                        tensor.ClearField(field)
                    tensor.data_location = TensorProto.EXTERNAL
                    for key, value in {"location": self.path.name, "offset": place, "length": len(data)}.items():
                        tensor.external_data.add(key=key, value=str(value))
        onnx.save(model, path)

    def _place(self, file, data):
        """Return where a tensor's bytes lie, writing them unless they are there."""
        digest = hashlib.sha256(data).digest()
        if digest not in self.places:
            file.write(bytes(-self.end % ALIGNMENT))
            self.end += -self.end % ALIGNMENT
            self.places[digest] = self.end
            file.write(data)
            self.end += len(data)
        return self.places[digest]
