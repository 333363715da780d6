defmodule VLLM.Server.Body do
  @moduledoc false
  # The body of a request, read from its socket as its head says that it comes: so
  # many bytes, or chunks until an empty one. It is in memory once, and never more
  # of it than it may have.

  alias VLLM.OpenAI.Refusal
  alias VLLM.Server.Head

  # What is read at once, and what the lines around chunks may have, in bytes.
  @piece 65_536
  @max_line 4_096

  @typedoc """
  From where it is read: `limit` is how many bytes it may have, `patience` how long a piece of it
  may take to come, in ms.
  """
  @type source :: %{socket: :gen_tcp.socket(), limit: pos_integer(), patience: pos_integer()}

  @doc "The body of a request with this head, of which `read` is there, and what comes after it."
  @spec read(source(), Head.t(), binary()) ::
          {:ok, binary(), binary()} | {:error, Refusal.t() | :closed}
  def read(source, %{length: :chunked}, read),
    do: source |> until(source.limit) |> chunks(read, "")

  def read(source, %{length: length}, read) do
    with {:ok, body, rest} <- source |> until(length) |> bytes(length, read),
         do: {:ok, IO.iodata_to_binary(body), rest}
  end

  # However small the pieces are in which it comes, it takes no longer than one of so many bytes may.
  defp until(source, bytes) do
    time = source.patience * (div(bytes, @piece) + 1)
    Map.put(source, :deadline, System.monotonic_time(:millisecond) + time)
  end

  defp bytes(_source, count, read) when byte_size(read) >= count do
    <<bytes::binary-size(count), rest::binary>> = read
    {:ok, bytes, rest}
  end

  defp bytes(source, count, read), do: pieces(source, count - byte_size(read), [read])

  defp pieces(_source, 0, pieces), do: {:ok, Enum.reverse(pieces), ""}

  defp pieces(source, left, pieces) do
    with {:ok, piece} <- more(source, min(left, @piece)),
         do: pieces(source, left - byte_size(piece), [piece | pieces])
  end

  # One binary that grows: however small the chunks are, it is not larger than they are together.
  defp chunks(source, read, body) do
    with {:ok, line, read} <- line(source, read),
         {:ok, count} <- count(line) do
      cond do
        count == 0 ->
          with {:ok, rest} <- trailers(source, read, 0), do: {:ok, body, rest}

        byte_size(body) + count > source.limit ->
          {:error, Refusal.too_large(source.limit)}

        true ->
          with {:ok, chunk, read} <- bytes(source, count, read),
               {:ok, "", read} <- line(source, read) do
            chunks(source, read, body <> IO.iodata_to_binary(chunk))
          else
            {:ok, _line, _read} -> {:error, no_chunk()}
            error -> error
          end
      end
    end
  end

  # What may be after the number says nothing that anybody uses.
  defp count(line) do
    case Regex.run(~r/\A([0-9A-Fa-f]{1,12})[ \t]*(;|\z)/, line) do
      [_line, digits, _end] -> {:ok, String.to_integer(digits, 16)}
      nil -> {:error, no_chunk()}
    end
  end

  defp no_chunk, do: Refusal.malformed("Its body is not in chunks.")

  # Headers after the body, which are left out.
  defp trailers(source, read, size) do
    case line(source, read) do
      {:ok, "", rest} -> {:ok, rest}
      {:ok, line, rest} when size < @max_line -> trailers(source, rest, size + byte_size(line))
      {:ok, _line, _rest} -> {:error, no_chunk()}
      {:error, reason} -> {:error, reason}
    end
  end

  defp line(source, read) do
    case :binary.split(read, "\r\n") do
      [line, rest] when byte_size(line) <= @max_line ->
        {:ok, line, rest}

      [_part] when byte_size(read) <= @max_line ->
        with {:ok, piece} <- more(source, 0), do: line(source, read <> piece)

      _too_long ->
        {:error, no_chunk()}
    end
  end

  defp more(source, count) do
    left = max(source.deadline - System.monotonic_time(:millisecond), 0)

    case :gen_tcp.recv(source.socket, count, min(source.patience, left)) do
      {:ok, piece} -> {:ok, piece}
      {:error, :timeout} -> {:error, Refusal.no_body()}
      {:error, _gone} -> {:error, :closed}
    end
  end
end
