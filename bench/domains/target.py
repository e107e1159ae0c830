"""The target of BYOL and BGRL: a second network that slowly follows the one that is trained.

Both methods train an online network to predict, from one view of an example, what a target network
makes of another view. The target has no gradient of its own: it is a moving average of those
parameters of the online network that it `follows`. It lies in a buffer of the online network, as
one flat vector named `target`, so that it is in every checkpoint and yet no part of θ.

In L_PT the target is a constant, and so it is in the hypergradient, which ignores that the target
will follow θ in the steps to come. φ moves the views that both networks see.
"""

from torch import Tensor, nn

Params = dict[str, Tensor]


def add_target(network: nn.Module, follows: Params) -> None:
    """Gives a network a target that begins as a copy of the parameters `follows`."""
    network.target = nn.Buffer(flat(follows))


def move_target(network: nn.Module, follows: Params, momentum: float) -> None:
    """Moves the target towards the parameters `follows`; a `momentum` of 1 would leave it still.

    Called as a PT step begins, so that the target has followed the step before it.
    """
    network.target.lerp_(flat(follows), 1 - momentum)


def target_params(network: nn.Module, follows: Params) -> Params:
    """The target as parameters, with the names and shapes of those that it follows."""
    sizes = [p.numel() for p in follows.values()]
    pieces = network.target.split(sizes)
    return {
        name: piece.view_as(p) for piece, (name, p) in zip(pieces, follows.items(), strict=True)
    }


def flat(params: Params) -> Tensor:
    """Parameters as one vector, without a gradient."""
    return nn.utils.parameters_to_vector(params.values()).detach()
