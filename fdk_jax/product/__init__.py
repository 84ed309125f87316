"""The product x @ w.T: its checks, gradients, sharding, and the backends that compute it."""
