"""Runs on another host: DuckDB queries the table where it lies. No byte of it came by a network."""

import os

import duckdb
import pyarrow as pa

import tagmem
from tagmem import shared

with tagmem.open(os.environ["TAGMEM_TAG"]) as capacity:
    with shared.open(capacity) as catalogue:
        orders = catalogue.get("orders")
    begin = capacity.address
    columns = [chunk for column in orders.columns for chunk in column.chunks]
    buffers = [buffer for chunk in columns for buffer in chunk.buffers() if buffer]
    inside = [begin <= buffer.address < begin + capacity.size for buffer in buffers]
    print(f"found {orders.num_rows} orders; {sum(inside)} of {len(inside)} buffers are in the tag")
    print(f"Arrow allocated {pa.total_allocated_bytes()} bytes to read them")
    query = """
        select customer, count(*) as orders, sum(amount) as amount
        from orders group by customer order by customer
    """
    for customer, count, amount in duckdb.sql(query).fetchall():
        print(f"{customer:8} {count:6} {amount:12.2f}")
    del orders, columns, buffers
