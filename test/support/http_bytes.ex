defmodule VLLM.HTTPBytes do
  @moduledoc """
  Requests over HTTP that are right, changed at random, byte by byte; and what a server says to them. Draws from
  `:rand` of the calling process, so that its seed gives the same requests again.
  """

  @body ~s({"model": "not-there", "prompt": "Hello", "stream": true})
  @requests [
    "GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "HEAD http://localhost/health?a=b HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    "GET /health HTTP/1.0\r\n\r\n",
    "OPTIONS /v1/completions HTTP/1.1\r\nHost: localhost\r\nOrigin: http://localhost\r\n\r\n",
    "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n" <>
      "Content-Length: #{byte_size(@body)}\r\n\r\n#{@body}",
    "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\n" <>
      "Transfer-Encoding: chunked\r\n\r\n" <>
      "5;a=b\r\n{\"a\":\r\n3\r\n 1}\r\n0\r\nTrailer: x\r\n\r\n"
  ]

  # What means something in a request, and what is too much of it.
  @pieces ["\r\n", "\n", "\r", "\r\n\r\n", "\0", " ", "\t", ":", ";", ",", "/", "?", "%00", ".."] ++
            ["-1", "0x10", "99999999999999999999", "HTTP/1.1", "HTTP/2.0", "é", <<0xFF>>] ++
            ["Host: localhost\r\n", "Content-Length: 5\r\n", "Content-Length: -1\r\n"] ++
            [
              "Transfer-Encoding: chunked\r\n",
              "Transfer-Encoding: gzip\r\n",
              "Connection: close\r\n"
            ] ++
            ["0\r\n\r\n", "fffffffffff\r\n", String.duplicate("a", 40_000)] ++
            [String.duplicate("a: b\r\n", 200)]

  # How long a client waits for more of an answer, in ms: of what is not whole there is none.
  @patience 100

  # One request or more, changed in up to four places, as two parts that are sent.
  defp request do
    requests = for _ <- 1..:rand.uniform(2), into: "", do: Enum.random(@requests)
    changed = Enum.reduce(1..:rand.uniform(4), requests, fn _, request -> change(request) end)
    at = :rand.uniform(byte_size(changed) + 1) - 1
    <<first::binary-size(at), rest::binary>> = changed
    {first, rest}
  end

  defp change(request) do
    at = :rand.uniform(byte_size(request) + 1) - 1
    <<before::binary-size(at), rest::binary>> = request
    some = min(:rand.uniform(24), byte_size(rest))
    <<part::binary-size(some), after_part::binary>> = rest

    case :rand.uniform(6) do
      1 -> before <> after_part
      2 -> before <> part <> part <> after_part
      3 -> before <> :rand.bytes(some) <> after_part
      4 -> before
      _ -> before <> Enum.random(@pieces) <> rest
    end
  end

  @doc """
  Sends a server of this machine so many requests, some at once, of which each client goes when it hears no more: how
  often each status came.
  """
  @spec ask(:inet.port_number(), pos_integer()) :: %{(100..599) => pos_integer()}
  def ask(port, count) do
    for(_ <- 1..count, do: request())
    |> Task.async_stream(&statuses(port, &1), max_concurrency: 50, timeout: :infinity)
    |> Enum.flat_map(fn {:ok, statuses} -> statuses end)
    |> Enum.frequencies()
  end

  defp statuses(port, {first, rest}) do
    socket = VLLM.HTTPClient.connect(port, nodelay: true)
    # A server that refuses the first of it may have closed the connection.
    _ = :gen_tcp.send(socket, first)
    _ = :gen_tcp.send(socket, rest)
    said = read(socket, [])
    :gen_tcp.close(socket)

    for [_, status] <- Regex.scan(~r/(?:\A|\n|\})HTTP\/1\.1 (\d{3}) /, said),
        do: String.to_integer(status)
  end

  defp read(socket, said) do
    case :gen_tcp.recv(socket, 0, @patience) do
      {:ok, more} -> read(socket, [said, more])
      {:error, _no_more} -> IO.iodata_to_binary(said)
    end
  end
end
