#!/usr/bin/env python3
"""A stand-in for `vllm serve` that only streams, as fast as one core can: what stands before it is the bottleneck.

Usable as LLM_BIN. A request's `token_every` is the seconds between tokens; without it they all come at once, each
still in a chunk of its own, as vLLM sends them.
"""

import asyncio
import json
import sys

TOKEN = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "fast"}
EVENT = b"data: " + json.dumps(TOKEN | {"choices": [{"index": 0, "delta": {"content": " ok"}, "finish_reason": None}]}).encode() + b"\n\n"
CHUNK = b"%x\r\n%s\r\n" % (len(EVENT), EVENT)
DONE = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"
ENOUGH = 1 << 16  # bytes that wait for a slow reader


def plain(body: object) -> bytes:
    data = json.dumps(body).encode()
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(data) + data


async def stream(writer: asyncio.StreamWriter, tokens: int, every_s: float) -> None:
    writer.write(HEAD)
    due_s = asyncio.get_running_loop().time()
    for _ in range(tokens):
        if every_s:
            due_s += every_s
            await asyncio.sleep(due_s - asyncio.get_running_loop().time())
        writer.write(CHUNK)
        if writer.transport.get_write_buffer_size() > ENOUGH:
            await writer.drain()
    writer.write(DONE)
    await writer.drain()


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while head := await reader.readuntil(b"\r\n\r\n"):
            lines = head.decode("latin-1").lower().split("\r\n")
            length = next((int(line[15:]) for line in lines if line.startswith("content-length:")), 0)
            body = await reader.readexactly(length)
            asked = json.loads(body) if body else {}
            tokens = int(asked.get("max_completion_tokens") or asked.get("max_tokens") or 16)
            if asked.get("stream"):
                await stream(writer, tokens, float(asked.get("token_every") or 0))
            elif lines[0].startswith("get /v1/models"):
                writer.write(plain({"object": "list", "data": [{"id": "fast", "object": "model"}]}))
            else:
                choice = {"index": 0, "message": {"role": "assistant", "content": "ok"}, "text": "ok", "finish_reason": "length"}
                writer.write(plain({"object": "chat.completion", "choices": [choice], "usage": {"completion_tokens": 1}}))
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()


async def main() -> None:
    port = int(sys.argv[sys.argv.index("--port") + 1])
    async with await asyncio.start_server(serve, "127.0.0.1", port, backlog=256) as server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
