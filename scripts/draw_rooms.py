"""Draws photos of empty rooms, so that the demo has something to stage and no picture lies in the repository.

Every pixel is a ray from the camera to the first surface of a box: where it lands gives the material, and the windows
and the edges of the box give the light.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

Array = NDArray[np.float32]

# Height and width in pixels, taken in turn: most photos lie, some stand.
SIZES = ((768, 1024), (768, 1024), (1024, 768), (720, 1080), (768, 1024), (800, 1000), (1024, 768), (768, 1024))
_SUPERSAMPLING = 2  # rays per pixel and axis; without it the joints of the floor flicker in the distance

_WALLS = ((0.88, 0.85, 0.79), (0.84, 0.87, 0.86), (0.91, 0.90, 0.88), (0.80, 0.84, 0.88), (0.88, 0.82, 0.76))
_FLOORS = ((0.66, 0.47, 0.30), (0.78, 0.62, 0.43), (0.47, 0.33, 0.23), (0.64, 0.63, 0.61), (0.58, 0.50, 0.42))
_DOORS = ((0.93, 0.92, 0.90), (0.55, 0.39, 0.25), (0.40, 0.44, 0.46))
_TRIM = (0.95, 0.94, 0.92)
_AMBIENT = 0.66

# The six faces of the box; the camera stands inside and looks from the front to the back.
_FLOOR, _CEILING, _LEFT, _RIGHT, _FRONT, _BACK = range(6)


@dataclass(frozen=True)
class Opening:
    """A window or a door: the wall it is in, and its edges in metres along the wall and above the floor."""

    wall: int
    start: float
    end: float
    bottom: float
    top: float


@dataclass(frozen=True)
class Room:
    """An empty room, in metres: x to the right, y up, z away from the camera. Colours are linear, 0 to 1."""

    size: tuple[float, float, float]
    camera: tuple[float, float, float]
    yaw: float
    pitch: float
    field_of_view: float
    wall_colour: tuple[float, float, float]
    floor_colour: tuple[float, float, float]
    door_colour: tuple[float, float, float]
    is_tiled: bool
    windows: tuple[Opening, ...]
    door: Opening
    texture_seed: int


def make_room(seed: int) -> Room:
    """Make up the room of one seed."""
    random = np.random.default_rng(seed)
    width, height, depth = random.uniform(3.9, 5.8), random.uniform(2.5, 2.9), random.uniform(4.6, 6.2)
    lengths = {_LEFT: depth, _RIGHT: depth, _BACK: width}
    window_wall, door_wall, other_wall = (int(wall) for wall in random.permutation([_LEFT, _RIGHT, _BACK]))
    window_walls = [window_wall, other_wall] if random.random() < 0.35 else [window_wall]
    door_start = lengths[door_wall] * random.uniform(0.45, 0.7) - 0.45
    return Room(
        size=(width, height, depth),
        camera=(width * random.uniform(0.38, 0.62), random.uniform(1.35, 1.6), random.uniform(0.15, 0.5)),
        yaw=float(random.uniform(-0.2, 0.2)),
        pitch=float(random.uniform(-0.12, -0.03)),
        field_of_view=float(random.uniform(1.15, 1.35)),
        wall_colour=_WALLS[random.integers(len(_WALLS))],
        floor_colour=_FLOORS[random.integers(len(_FLOORS))],
        door_colour=_DOORS[random.integers(len(_DOORS))],
        is_tiled=bool(random.random() < 0.25),
        windows=tuple(_make_window(random, wall, lengths[wall], height) for wall in window_walls),
        door=Opening(door_wall, door_start, door_start + 0.9, 0.0, 2.05),
        texture_seed=int(random.integers(1 << 16)),
    )


def _make_window(random: np.random.Generator, wall: int, wall_length: float, room_height: float) -> Opening:
    window_width = random.uniform(1.2, 2.0)
    start = random.uniform(0.4, 0.8) * (wall_length - window_width)
    bottom = random.uniform(0.55, 0.95)
    return Opening(
        wall, start, start + window_width, bottom, min(room_height - 0.25, bottom + random.uniform(1.2, 1.5))
    )


def draw_room(room: Room, height: int, width: int) -> Image.Image:
    """Draw an empty room.

    Args:
        room: what to draw.
        height: of the picture, in pixels.
        width: of the picture, in pixels.

    Returns:
        RGB, 8 bit.
    """
    directions = _ray_directions(room, height * _SUPERSAMPLING, width * _SUPERSAMPLING)
    face, points = _hit_box(room, directions)
    colours = _materials(room, face, points) * _light(room, face, points)[..., None]
    for window in room.windows:
        _look_outside(colours, window, face, points, directions)
    colours = colours.reshape(height, _SUPERSAMPLING, width, _SUPERSAMPLING, 3).mean((1, 3))
    colours += np.random.default_rng(room.texture_seed).normal(0, 0.008, colours.shape)  # a camera's noise
    return Image.fromarray((np.clip(colours, 0, 1) ** 0.85 * 255).round().astype(np.uint8))


def _array(values: ArrayLike) -> Array:
    return np.asarray(values, dtype=np.float32)


def _ray_directions(room: Room, height: int, width: int) -> Array:
    """Directions of the rays, (height, width, 3)."""
    focal_length = 0.5 * max(height, width) / np.tan(room.field_of_view / 2)
    down, right = np.mgrid[0:height, 0:width].astype(np.float32)
    x = (right + 0.5 - width / 2) / focal_length
    y = (height / 2 - down - 0.5) / focal_length
    y, z = y * np.cos(room.pitch) + np.sin(room.pitch), np.cos(room.pitch) - y * np.sin(room.pitch)
    x, z = x * np.cos(room.yaw) + z * np.sin(room.yaw), z * np.cos(room.yaw) - x * np.sin(room.yaw)
    return np.stack([x, y, z], axis=-1).astype(np.float32)


def _hit_box(room: Room, directions: Array) -> tuple[NDArray[np.intp], Array]:
    """Which face each ray hits, (height, width), and where, (height, width, 3)."""
    directions = np.where(np.abs(directions) < 1e-6, 1e-6, directions)
    size, camera = _array(room.size), _array(room.camera)
    distances = (np.where(directions > 0, size, 0) - camera) / directions
    axis = distances.argmin(-1)
    nearest = np.take_along_axis(distances, axis[..., None], -1)
    is_far = np.take_along_axis(directions, axis[..., None], -1)[..., 0] > 0
    faces = np.array([[_LEFT, _RIGHT], [_FLOOR, _CEILING], [_FRONT, _BACK]])
    return faces[axis, is_far.astype(int)].astype(np.intp), _array(camera + directions * nearest)


def _along_wall(wall: int, points: Array) -> Array:
    return points[..., 0] if wall == _BACK else points[..., 2]


def _inside(opening: Opening, face: NDArray[np.intp], points: Array, margin: float = 0.0) -> NDArray[np.bool_]:
    along, above = _along_wall(opening.wall, points), points[..., 1]
    return (
        (face == opening.wall)
        & (along > opening.start - margin)
        & (along < opening.end + margin)
        & (above > opening.bottom - margin)
        & (above < opening.top + margin)
    )


def _materials(room: Room, face: NDArray[np.intp], points: Array) -> Array:
    """Colour of each point in even white light, (height, width, 3)."""
    colours = np.empty_like(points)
    colours[:] = room.wall_colour
    colours[face == _CEILING] = (0.95, 0.95, 0.94)
    on_floor = face == _FLOOR
    tones = _tiles(points[on_floor]) if room.is_tiled else _planks(points[on_floor], room.texture_seed)
    colours[on_floor] = _array(room.floor_colour) * tones[..., None]
    colours[(face >= _LEFT) & (points[..., 1] < 0.1)] = _TRIM
    for opening in (*room.windows, room.door):
        colours[_inside(opening, face, points, margin=0.08)] = _TRIM
    in_door = _inside(room.door, face, points)
    colours[in_door] = _array(room.door_colour) * _door_panels(room.door, points[in_door])[..., None]
    return colours


def _planks(points: Array, seed: int) -> Array:
    """Tone of each point of a wooden floor: boards of 16 cm, each a little lighter or darker, with joints."""
    board = np.floor(points[..., 0] / 0.16)
    tones = np.random.default_rng(seed).uniform(0.86, 1.1, (64, 16)).astype(np.float32)
    start = (board * 0.618) % 1 * 1.6  # neighbours end at different places
    piece = np.floor((points[..., 2] + start) / 1.6)
    tone = tones[board.astype(int) % 64, piece.astype(int) % 16]
    grain = 1 + 0.03 * np.sin(points[..., 0] * 310 + 3 * np.sin(points[..., 2] * 4 + board))
    is_joint = (points[..., 0] % 0.16 < 0.005) | ((points[..., 2] + start) % 1.6 < 0.006)
    return np.where(is_joint, tone * 0.6, tone * grain)


def _tiles(points: Array) -> Array:
    """Tone of each point of a floor with tiles of 45 cm."""
    is_joint = (points[..., 0] % 0.45 < 0.008) | (points[..., 2] % 0.45 < 0.008)
    tile = np.floor(points[..., 0] / 0.45) * 7 + np.floor(points[..., 2] / 0.45) * 13
    return np.where(is_joint, np.float32(0.72), 1 + 0.03 * np.sin(tile * 12.9).astype(np.float32))


def _door_panels(door: Opening, points: Array) -> Array:
    """Tone of each point of a door: two panels with an edge in the shade, and a handle."""
    along = (_along_wall(door.wall, points) - door.start) / (door.end - door.start)
    above = points[..., 1]
    tone = np.ones_like(above)
    for bottom, top in ((0.2, 0.95), (1.1, 1.85)):
        in_panel = (along > 0.16) & (along < 0.84) & (above > bottom) & (above < top)
        in_field = (along > 0.2) & (along < 0.8) & (above > bottom + 0.035) & (above < top - 0.035)
        tone[in_panel & ~in_field] = 0.86
    tone[(along > 0.86) & (along < 0.95) & (np.abs(above - 1.02) < 0.02)] = 0.45
    return tone


def _light(room: Room, face: NDArray[np.intp], points: Array) -> Array:
    """Brightness of each point, (height, width): daylight of the windows, and shade along the edges."""
    normals = _array([(0, 1, 0), (0, -1, 0), (1, 0, 0), (-1, 0, 0), (0, 0, 1), (0, 0, -1)])
    brightness = np.full(face.shape, _AMBIENT, np.float32)
    for window in room.windows:
        centre, outward = _window_centre(room, window), -normals[window.wall]
        ways = centre - points
        squared = (ways**2).sum(-1)
        leaving = np.maximum(0, ways @ outward)
        arriving = np.maximum(0, (ways * normals[face]).sum(-1))
        area = (window.end - window.start) * (window.top - window.bottom)
        brightness += 0.55 * area * leaving * arriving / (squared**2 + 0.6)
    size = _array(room.size)
    # The smallest of the three distances is the face itself, the next is that of the nearest edge.
    edge_distance = np.sort(np.minimum(points, size - points), axis=-1)[..., 1]
    return _array(brightness * (1 - 0.22 * np.exp(-np.maximum(edge_distance, 0) / 0.22)))


def _window_centre(room: Room, window: Opening) -> Array:
    along, above = (window.start + window.end) / 2, (window.bottom + window.top) / 2
    places = {_LEFT: (0, above, along), _RIGHT: (room.size[0], above, along), _BACK: (along, above, room.size[2])}
    return _array(places[window.wall])


def _look_outside(colours: Array, window: Opening, face: NDArray[np.intp], points: Array, directions: Array) -> None:
    """Paint the panes of a window with what is behind them; the bars between them stay."""
    along, above = _along_wall(window.wall, points), points[..., 1]
    middle = (window.start + window.end) / 2
    is_bar = (np.abs(along - middle) < 0.025) | (np.abs(above - window.bottom - 0.9) < 0.02)
    pane = _inside(window, face, points) & ~is_bar
    upward = directions[pane][:, 1] / np.linalg.norm(directions[pane], axis=-1)
    sky = _array((0.78, 0.89, 0.99)) + np.clip(0.25 - upward, 0, 0.25)[:, None] * _array((0.8, 0.4, 0.1))
    garden = _array((0.50, 0.62, 0.38)) * (1 + np.clip(upward, -0.4, 0)[:, None])
    colours[pane] = np.where(upward[:, None] > 0, sky, garden)


def draw_rooms(folder: Path, num_rooms: int, *, first_seed: int = 0) -> list[Path]:
    """Write `num_rooms` photos of different empty rooms as JPEG files; the same seeds give the same rooms.

    Returns:
        The files, in order.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    for number in range(num_rooms):
        height, width = SIZES[number % len(SIZES)]
        file = folder / f"room-{number + 1}.jpg"
        draw_room(make_room(first_seed + number), height, width).save(file, quality=90)
        files.append(file)
    return files


def main() -> None:
    """Draw rooms into a folder."""
    parser = argparse.ArgumentParser(description="Draw photos of empty rooms.")
    parser.add_argument("--out", type=Path, default=Path("demo-output/rooms"), help="folder (default: %(default)s)")
    parser.add_argument("--count", type=int, default=8, help="number of rooms (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first room (default: %(default)s)")
    options = parser.parse_args()
    for file in draw_rooms(options.out, options.count, first_seed=options.seed):
        print(file)


if __name__ == "__main__":
    main()
