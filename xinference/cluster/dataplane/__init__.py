# SPDX-License-Identifier: Apache-2.0
"""The data plane: requests and text between a gateway and a replica, in frames of msgpack.

`doc/data-plane.md` is the written protocol. `client.py` is the gateway's and the model actor's
end, `server.py` the replica's; `frames.py`, `handshake.py` and `requests.py` are pure.
"""
