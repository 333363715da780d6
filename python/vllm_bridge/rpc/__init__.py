"""MessagePack-RPC over two pipes: the wire, the connection, and a server of a table of methods.

Nothing in here knows what is served. What a worker can do is its ``table.Table``.
"""
