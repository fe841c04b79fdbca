"""
Reading what a stranger may have written: weights and json. A file is not believed: what it claims is held against what
it holds before anything is built of it, none of its code is run, and what is wrong with it is one sentence.
"""
import json
import pickletools
import tarfile
import warnings
import zipfile
from io import BytesIO
from math import prod
from pathlib import Path

import torch

from ddp import InputError

# All that a weights file may name, in the `module name` of its pickle. torch.load(weights_only=True) runs no code
# either, but it allows bytearray and the tensor classes too, which allocate what they are told to, and torch 2.6 reads
# on behind the end of a record that is shorter than the storage that is claimed for it.
CONTAINERS = ("collections OrderedDict", "collections Counter", "torch Size")
REBUILD = {"torch._utils _rebuild_tensor": 4, "torch._utils _rebuild_tensor_v2": 6,
           "torch._utils _rebuild_parameter": 3}                          # and their number of arguments, at least
ITEM_SIZE = {f"{module} {kind}Storage": size for module in ("torch", "torch.cuda") for size, kinds in (
    (8, "Double Long"), (4, "Float Int"), (2, "Half BFloat16 Short"), (1, "Char Byte Bool")) for kind in kinds.split()}
STRUCTURE = 2**23  # bytes of pickle around the tensors: a ResNet-152 with its optimiser has 0.2 MB. A byte makes 64 of
#                    memory at most (an empty dictionary), so that this is half a GB at the very worst


class Refused(Exception):
    """Why, as it stands in the sentence."""


class Named(str):
    """A class or function that a pickle names; it is not looked up."""


class Ordered(dict):
    """In the place of an OrderedDict, the only thing that may have an attribute: load_state_dict's _metadata."""


def printable(text):
    """The start of a stranger's text, without what a terminal would obey."""
    return "".join(c if c.isprintable() else "?" for c in str(text)[:300])


def put(dictionary, pairs):
    """pairs: key, value, key, value ..."""
    if not isinstance(dictionary, dict) or not all(isinstance(key, (str, int, float)) for key in pairs[::2]):
        raise Refused("holds a dictionary whose keys are no names")
    dictionary.update(zip(pairs[::2], pairs[1::2], strict=True))


def tensor_fits(size, stride, offset, items):
    """Raise Refused unless the tensor lies inside its storage of so many items, and is not one item claimed often."""
    if not all(type(n) is int and 0 <= n < 2**63 for n in (offset, *size, *stride)) or len(size) != len(stride):
        raise Refused("holds a tensor of impossible shape")
    numbers = prod(size[:64])  # torch has no more dimensions either
    last = offset + sum((n - 1) * step for n, step in zip(size, stride))
    if len(size) > 64 or numbers > items or numbers and last >= items:
        raise Refused(f"claims a tensor of shape {tuple(size[:8])} in a storage of {items:,} numbers")


def walk(stream, storages):
    """What one pickle of torch.save holds, without unpickling it: dictionaries, lists and tuples as they are, None for
    a tensor. Adds to `storages` those that it claims, {key: (bytes, items)}. Raises Refused, or ValueError,
    LookupError, TypeError for a pickle that is broken."""
    stack, marks, memo = [], [], {}

    def take(n):
        taken = [stack.pop() for _ in range(n)]
        return taken[::-1]

    def to_mark():
        return take(len(stack) - marks.pop())

    def call(name, args):
        if not isinstance(name, Named):
            raise Refused("calls what is no function")
        if name == "collections OrderedDict":  # Python 2 gives it a list of pairs
            ordered = Ordered()
            put(ordered, [x for pair in (args[0] if args else ()) for x in pair])
            return ordered
        if name == "collections Counter" and all(isinstance(x, dict) for x in args):
            return dict(*args)
        if name == "torch Size" and len(args) == 1 and isinstance(args[0], tuple):
            return args[0]
        if len(args) < REBUILD.get(name, 99) or name.endswith("parameter") and args[2] or any(args[5:]):
            raise Refused("holds a tensor with hooks or marks of its own")
        if not name.endswith("parameter"):
            storage, offset, size, stride = args[:4]
            tensor_fits(size, stride, offset, storages[storage][1])

    for op, arg, _ in pickletools.genops(stream):
        name = op.name
        if name in ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"):
            stack.append(arg)
        elif name in ("NONE", "NEWTRUE", "NEWFALSE"):
            stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
        elif name in ("EMPTY_TUPLE", "EMPTY_LIST", "EMPTY_DICT"):
            stack.append({"EMPTY_TUPLE": (), "EMPTY_LIST": [], "EMPTY_DICT": {}}[name])
        elif name == "GLOBAL":
            if arg not in CONTAINERS and arg not in REBUILD and arg not in ITEM_SIZE:
                raise Refused(f"holds `{arg.replace(' ', '.')}`, where only tensors, numbers, text and containers are "
                              "read; if you trust it, save its state_dict alone")
            stack.append(Named(arg))
        elif name == "MARK":
            marks.append(len(stack))
        elif name == "TUPLE":
            stack.append(tuple(to_mark()))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(tuple(take(int(name[-1]))))
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[arg] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            thing = memo[arg]
            if isinstance(thing, (list, dict)) or isinstance(thing, tuple) and (
                    len(thing) > 16 or any(isinstance(x, (list, dict, tuple)) for x in thing)):
                raise Refused("holds one container in two places")  # thirty times nested that is 2**30 to look through
            stack.append(thing)
        elif name in ("APPEND", "APPENDS"):
            things = take(1) if name == "APPEND" else to_mark()
            if not isinstance(stack[-1], list):
                raise Refused("appends to what is no list")
            stack[-1].extend(things)
        elif name in ("SETITEM", "SETITEMS"):
            pairs = take(2) if name == "SETITEM" else to_mark()
            put(stack[-1], pairs)
        elif name == "BINPERSID":
            (kind, storage, key, _, items, *view), = take(1)
            if kind != "storage" or not isinstance(key, str) or type(items) is not int or items < 0 or any(view):
                raise Refused("refers to what is no storage")
            size = items * ITEM_SIZE[storage]
            if storages.setdefault(key, (size, items))[0] != size:
                raise Refused("claims two sizes for one storage")
            stack.append(key)
        elif name == "REDUCE":
            stack.append(call(*take(2)))
        elif name == "BUILD":
            state, = take(1)
            versions = state.get("_metadata", {}).values()
            if not isinstance(stack[-1], Ordered) or set(state) - {"_metadata"} or not all(
                    isinstance(version, (int, bool)) for module in versions for version in module.values()):
                raise Refused("sets attributes")
        elif name == "STOP":
            return stack.pop()
        elif name != "PROTO" or arg != 2:
            raise Refused(f"holds the pickle instruction {name} {arg or ''}, which torch.save does not write")
    raise Refused("ends too early")


def check(path):
    """Raise what walk() does unless the file is one that torch.save writes, and holds all that it claims."""
    size, storages = path.stat().st_size, {}
    with open(path, "rb") as f:
        content = BytesIO(f.read(STRUCTURE))
    if content.getvalue()[:4] == b"PK\x03\x04":
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            sizes = {entry.filename.lower(): entry.file_size for entry in entries}  # as torch looks them up
            folder = entries[0].filename.split("/")[0]
            if f"{folder}/constants.pkl".lower() in sizes:
                raise Refused("is a TorchScript archive; save its state_dict")
            if sum(entry.file_size for entry in entries) > size or any(entry.compress_type for entry in entries):
                raise Refused(f"unpacks to {sum(entry.file_size for entry in entries):,} bytes from {size:,}, and "
                              "torch.save does not compress")
            # what is before the first entry or behind the last makes two readers see two archives
            if len(sizes) < len(entries) or archive.comment or min(entry.header_offset for entry in entries):
                raise Refused("is an archive that torch.save does not write")
            if sizes[f"{folder}/data.pkl".lower()] > STRUCTURE:
                raise Refused(f"has more than {STRUCTURE:,} bytes of structure around its tensors")
            walk(BytesIO(archive.read(f"{folder}/data.pkl")), storages)
        for key, (claimed, _) in storages.items():
            if claimed != sizes.get(f"{folder}/data/{key}".lower()):
                raise Refused(f"claims {claimed:,} bytes for storage {key}, which has "
                              f"{sizes.get(f'{folder}/data/{key}'.lower(), 0):,}")
    else:  # the format before torch 1.6: five pickles, then the storages
        if tarfile.is_tarfile(path):  # the one before that, which is unpacked to a folder
            raise Refused("is a tar archive")
        if walk(content, {}) != torch.serialization.MAGIC_NUMBER or walk(content, {}) != 1001:
            raise Refused("is not a file of torch.save")
        walk(content, {})
        walk(content, storages)
        if sorted(walk(content, {})) != sorted(storages):
            raise Refused("lists other storages than its tensors need")
        if (claimed := sum(bytes for bytes, _ in storages.values())) > size:
            raise Refused(f"claims {claimed:,} bytes of tensors in a file of {size:,}")


def read(path, expected, device="cpu"):
    """The dictionary in a file of torch.save, or of safetensors where that is installed.

    Raises InputError, one sentence that ends with what was expected, for whatever else it is. Takes as much memory as
    the file has bytes, and half a GB more at the very worst."""
    path = Path(path)
    try:
        if not path.is_file():
            raise Refused("no such file")
        if path.suffix == ".safetensors":
            try:
                from safetensors.torch import load_file
            except ImportError:
                raise Refused("safetensors is missing: `pip install safetensors`") from None
            return load_file(path, str(device))
        check(path)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # torch warns of nothing in a file that it wrote
            content = torch.load(path, map_location=device, weights_only=True)
        if not isinstance(content, dict):
            raise Refused(f"holds a {type(content).__name__}")
        return content
    except Refused as error:
        reason = printable(error)
    except Exception as error:  # half a dozen kinds, on a file that is none of torch's
        reason = f"no file of torch.save, or a broken one ({type(error).__name__})"
    raise InputError(f"{path}: {reason}; expected {expected}")


def read_json(path, expected):
    """What a json file holds. Raises InputError, one sentence that ends with what was expected."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; expected {expected}") from None
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        raise InputError(f"{path}: not json ({type(error).__name__}); expected {expected}") from None
