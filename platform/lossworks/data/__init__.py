"""From text to batches of tokens, and labelled examples: sources, splits, and the training order.

``prepare`` is called once, by the driver; workers open its folder with ``TokenizedCorpus.open``, which needs
numpy and torch only.
"""

from lossworks.data.batch import IGNORE_INDEX, Batch
from lossworks.data.examples import ExampleData, Examples, load_examples
from lossworks.data.order import BagOrder, Order, SequenceOrder, VisitOrder
from lossworks.data.text.corpus import documents, fingerprint
from lossworks.data.text.preparation import prepare
from lossworks.data.text.readers import Piece
from lossworks.data.text.tokenized_corpus import TokenizedCorpus, TokenSequences
from lossworks.data.text.tokenizer import end_of_text_id, load_tokenizer, token_bytes, train_tokenizer

__all__ = [
    "IGNORE_INDEX",
    "BagOrder",
    "Batch",
    "ExampleData",
    "Examples",
    "Order",
    "Piece",
    "SequenceOrder",
    "TokenSequences",
    "TokenizedCorpus",
    "VisitOrder",
    "documents",
    "end_of_text_id",
    "fingerprint",
    "load_examples",
    "load_tokenizer",
    "prepare",
    "token_bytes",
    "train_tokenizer",
]
