"""What only two ranks can show; test_scripts.py starts it on two. Prints ok on rank 0."""
import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import ddp
import det_data
import resnet
import transfer_det
from baselines import BBN, Targets, bbn_loss, supcon_loss
from moco import MoCo


def main():
    ddp.init()
    rank, world = ddp.rank(), ddp.world()
    assert world == 2
    assert ddp.gather(torch.tensor([[rank, 7]])).tolist() == [[0, 7], [1, 7]]

    # ranks hold the same weights, other images
    torch.manual_seed(0)
    moco = MoCo(lambda num_classes: nn.Sequential(nn.Flatten(), nn.Linear(12, num_classes)), dim=5, K=10)
    images = torch.randn(8, 3, 2, 2)
    mine = images[rank * 4:(rank + 1) * 4]
    labels = torch.arange(8).where(torch.arange(8) < 7, -7)[rank * 4:(rank + 1) * 4]
    expected = F.normalize(moco.encoder_k(images))
    for _ in range(3):  # shuffled across ranks and back in order
        keys, key_labels = moco.keys(mine, labels)
        assert torch.allclose(keys, expected, atol=1e-6) and key_labels.tolist() == [0, 1, 2, 3, 4, 5, 6, -7]
        assert torch.equal(moco.own(keys), keys[rank * 4:(rank + 1) * 4])

    # what a rank receives: the images that the shuffle takes from the other, as uint8, and the other's keys and labels
    received = []
    def count(collective, sent_to_itself):
        def counted(out, *args):
            received.append(sum(x.numel() * x.element_size() for x in (out if isinstance(out, list) else [out])))
            received[-1] -= sent_to_itself(out, args)
            return collective(out, *args)
        return counted
    d = torch.distributed
    kept = d.all_gather, d.all_to_all_single
    d.all_gather = count(d.all_gather, lambda out, args: out[0].numel() * out[0].element_size())
    d.all_to_all_single = count(d.all_to_all_single, lambda out, args: args[1][rank] * 3 * 2 * 2)
    uint8, generator = torch.zeros(4, 3, 2, 2, dtype=torch.uint8), torch.Generator()
    generator.set_state(moco.shuffle.get_state())
    for _ in range(5):
        received.clear()
        moco.keys(uint8, labels, prepare=torch.Tensor.float)
        wanted = torch.randperm(8, generator=generator)[rank * 4:(rank + 1) * 4]
        foreign = sum(n // 4 != rank for n in wanted.tolist())
        assert received == [foreign * 3 * 2 * 2, (world - 1) * 4 * (4 * 5 + 8)]  # the docstring's formula
    d.all_gather, d.all_to_all_single = kept

    seen = []
    moco.encoder_k.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    foreign = 0
    for _ in range(20):
        moco.keys(mine, labels)
        foreign += sum(not any(torch.equal(x, y) for y in mine) for x in seen[-1])
    assert 0.3 < foreign / 80 < 0.7, foreign  # about half of what a rank encodes comes from the other

    # one queue, the same on both, in rank order
    moco.enqueue(*moco.keys(mine, labels))
    assert moco.ptr == 8 and moco.queue_labels.tolist() == [0, 1, 2, 3, 4, 5, 6, -7, -1, -1]
    assert torch.allclose(moco.queue[:8], expected, atol=1e-6)

    # a step: gradients are the mean over ranks, so the weights stay the same on both
    net = ddp.wrap(moco.encoder_q)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    F.normalize(net(mine)).sum().backward()
    optimizer.step()
    moved = torch.cat([p.detach().flatten() for p in net.parameters()])
    both = ddp.gather(moved[None])
    alone = MoCo(lambda num_classes: nn.Sequential(nn.Flatten(), nn.Linear(12, num_classes)), dim=5, K=10)
    alone.encoder_q.load_state_dict(moco.encoder_k.state_dict())  # the weights of before
    (F.normalize(alone.encoder_q(images)).sum() / 2).backward()
    expected = torch.cat([(p - 0.1 * p.grad).detach().flatten() for p in alone.encoder_q.parameters()])
    assert torch.equal(both[0], both[1]) and torch.allclose(moved, expected, atol=1e-6)

    # a loss on the embeddings of both ranks has the gradient that one process has
    alone.zero_grad()
    supcon_loss(F.normalize(alone.encoder_q(images)), torch.arange(8) // 4 * 2 % 3).backward()  # classes 0 and 2
    optimizer.zero_grad()
    moco.encoder_q.load_state_dict(alone.encoder_q.state_dict())
    z = ddp.GatherWithGradient.apply(F.normalize(net(mine)))
    supcon_loss(z, ddp.gather(torch.full((4,), 2 * rank))).backward()
    for p, expected in zip(net.parameters(), alone.encoder_q.parameters()):
        assert torch.allclose(p.grad, expected.grad, atol=1e-6)

    # two forwards of one network in a step, as BBN's: DDP averages the gradients of both
    bbn = BBN(resnet.ARCHS["resnet8"], 3)
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(rank))
    both_branches = ddp.wrap(bbn)
    bbn_loss(both_branches(x, x.flip(0), 0.3), torch.arange(4) % 3, torch.arange(4) % 2, 0.3).backward()
    both = ddp.gather(torch.cat([p.grad.flatten() for p in bbn.parameters()])[None])
    assert torch.equal(both[0], both[1]) and all(p.grad.abs().sum() > 0 for p in bbn.parameters())

    # TSC: every rank has seen every query, so all agree on means and targets
    torch.manual_seed(0)
    targets = Targets(3, 5)
    q = F.normalize(torch.randn(4, 5, generator=torch.Generator().manual_seed(rank)))
    targets.follow(ddp.gather(q), ddp.gather(torch.arange(4) % 3))
    targets.assign()
    both = ddp.gather(torch.cat([targets.means.flatten(), targets.of_classes().flatten()])[None])
    assert torch.equal(both[0], both[1])

    # no image on two ranks, none missing
    view = torch.zeros(3, 2, 2, dtype=torch.uint8)
    share = torch.cat([index for _, _, index in data.eval_loader([([view], 0, i) for i in range(11)], 2, 0)])
    together = [None, None]
    torch.distributed.all_gather_object(together, share.tolist())
    assert sorted(together[0] + together[1]) == list(range(11))

    # detection: two ranks find, image by image, what one finds, and hold the same precise statistics
    torch.manual_seed(0)
    spec, heads = transfer_det.SETTINGS["digits"], {**transfer_det.HEADS["digits"], "proposals": ((60, 20), (60, 10))}
    detector = transfer_det.build_detector(resnet.ARCHS["resnet8"](), "fpn", 10, True, heads, spec["scales"],
                                           spec["max_size"], spec["mean"], spec["std"])
    dataset, load = det_data.digits_dictionary("test", 5)
    scenes = det_data.Scenes(det_data.checked(dataset, "scenes"), load, masks=True)
    items = [scenes[i] for i in range(rank, 5, 2)]
    transfer_det.precise_bn(detector, [([det_data.to_input(pixels, "cpu")], [target]) for pixels, target in items])
    statistics = torch.cat([x.flatten() for name, x in detector.state_dict().items() if "running" in name])
    both = ddp.gather(statistics[None])
    assert torch.equal(both[0], both[1]) and not torch.equal(both[0], torch.zeros_like(both[0]))
    detector.roi_heads.score_thresh = 0.0
    together = transfer_det.predict(detector, scenes, "cpu")
    ddp.rank, ddp.world = lambda: 0, lambda: 1
    alone = transfer_det.predict(detector, scenes, "cpu")
    assert len({d["image_id"] for d in alone}) == 5 and together == alone
    if rank == 0:
        print("ok", flush=True)
