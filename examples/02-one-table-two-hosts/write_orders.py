"""Runs on one host: puts a table of orders into the tag's memory, where the other host finds it."""

import os

import numpy as np
import pyarrow as pa

from tagmem import shared

ORDERS = 200_000
CUSTOMERS = ("ada", "grace", "edsger", "barbara")

number = np.arange(ORDERS)
orders = pa.table(
    {
        "id": number,
        "customer": pa.DictionaryArray.from_arrays((number % 4).astype("i1"), list(CUSTOMERS)),
        "amount": (number % 1000) / 4,
    }
)

with shared.create(os.environ["TAGMEM_TAG"]) as catalogue:
    entry = catalogue.put("orders", orders)
    print(f"wrote {orders.num_rows} orders, {entry.length_bytes} bytes, as 'orders'")
