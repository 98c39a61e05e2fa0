"""Split learning: a net in two halves, the clients' and the server's, which step together on every batch.

The rounds of MocoSFL (algorithms/mocosfl.py). half.py, rules.py, key_queue.py, client_halves.py
and server_half.py are the computation, joint.py their step; none of them knows of the simulator.
"""
