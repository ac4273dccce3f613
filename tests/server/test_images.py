"""Images through the `openai` client: those of the offline API."""

import base64
import io

import openai
import pytest
from PIL import Image

from .conftest import MODEL


def paint(client, prompt="red apple", **options):
    return client.images.generate(model=MODEL, prompt=prompt, **options)


def pixels(image):
    """Of a Pillow image or of what the API sent."""
    image = image if isinstance(image, Image.Image) else Image.open(io.BytesIO(base64.b64decode(image)))
    return image.size, image.convert("RGB").tobytes()


EXTENSIONS = {"guidance_scale": 2.0, "top_k": 30, "temperature": 0.9, "seed": 3}


def test_images_are_those_of_generate_image(client, omni):
    response = paint(client, n=3, size="auto", response_format="b64_json", extra_body=EXTENSIONS)
    expected = omni.generate_image("red apple", num_images=3, **EXTENSIONS)
    assert [pixels(image.b64_json) for image in response.data] == [pixels(image) for image in expected]
    assert len({pixels(image) for image in expected}) == 3
    assert response.seed == 3 and response.output_format == "png" and response.size == f"{expected[0].width}x{expected[0].height}"
    num_tokens = omni.config.num_image_tokens
    assert response.usage.output_tokens == 3 * num_tokens and response.usage.total_tokens == 3 * num_tokens + response.usage.input_tokens


def test_the_models_defaults_and_a_drawn_seed(client, omni):
    first, second = paint(client), paint(client)
    assert first.seed != second.seed
    assert pixels(first.data[0].b64_json) == pixels(omni.generate_image("red apple", seed=first.seed)[0])


def test_more_images_than_slots(new_omni, serve, omni):
    with serve(new_omni(num_slots=3)) as small:
        response = paint(small.client, n=4, extra_body=EXTENSIONS)
        small.settle()
    expected = omni.generate_image("red apple", num_images=4, **EXTENSIONS)
    assert [pixels(image.b64_json) for image in response.data] == [pixels(image) for image in expected]


@pytest.mark.parametrize("num", [0, 1, 2, 3])
def test_streamed_partial_images(client, omni, num):
    events = list(paint(client, stream=True, partial_images=num, extra_body=EXTENSIONS))
    expected = {}
    omni.generate_image("red apple", callback=lambda _, image, done: expected.setdefault(done, pixels(image)), **EXTENSIONS)
    grid_size = omni.vq.config.grid_size
    rows = sorted({max(1, grid_size * i // (num + 1)) for i in range(1, num + 1)})
    assert [event.type for event in events] == ["image_generation.partial_image"] * len(rows) + ["image_generation.completed"]
    for i, (event, row) in enumerate(zip(events, rows, strict=False)):
        assert event.partial_image_index == i and pixels(event.b64_json) == expected[row / grid_size]
    assert pixels(events[-1].b64_json) == pixels(omni.generate_image("red apple", **EXTENSIONS)[0])
    assert events[-1].usage.output_tokens == omni.config.num_image_tokens and events[-1].seed == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": " "}, "caption ' ' is empty"),
        ({"prompt": "a" * 100}, "caption has 100 tokens, the limit is 24"),
        ({"prompt": "a" * 30_000}, "the limit is 20000"),
        ({"size": "1024x1024"}, "this model paints 32x32, not '1024x1024'"),
        ({"n": 9}, "n=9 is too many"),
        ({"response_format": "url"}, "response_format: Input should be 'b64_json'"),
        ({"partial_images": 1}, "with stream=true only"),
        ({"stream": True, "partial_images": 99}, "partial_images=99 is too many"),
        ({"stream": True, "n": 2}, "one image is streamed at a time"),
        ({"extra_body": {"guidance_scale": -1}}, "guidance_scale: Input should be greater"),
        ({"extra_body": {"guidance_scale": 1e9}}, "guidance_scale: Input should be less"),
        ({"extra_body": {"top_p": 0}}, "top_p"),
        ({"quality": "hd"}, "quality"),
    ],
)
def test_what_the_model_cannot_paint(client, options, message):
    with pytest.raises(openai.BadRequestError, match=message):
        paint(client, **options)


def test_a_model_without_its_painter(new_omni, serve):
    omni = new_omni()
    omni.bundle.vq = omni.bundle.vision = None
    with serve(omni) as running:
        with pytest.raises(openai.BadRequestError, match="paints no image"):
            paint(running.client)
        message = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]}
        with pytest.raises(openai.BadRequestError, match="sees no image"):
            running.client.chat.completions.create(model=MODEL, messages=[message])
