defmodule VLLM.Server.Response do
  @moduledoc false
  # Answers as HTTP/1 has them, written to the client's socket.

  alias VLLM.Error
  alias VLLM.Server.Head

  @typedoc "Where an answer goes, and how."
  @type client :: %{
          socket: :gen_tcp.socket(),
          keeps?: boolean(),
          chunks?: boolean(),
          body?: boolean()
        }

  @phrases %{
    200 => "OK",
    201 => "Created",
    202 => "Accepted",
    204 => "No Content",
    400 => "Bad Request",
    401 => "Unauthorized",
    403 => "Forbidden",
    404 => "Not Found",
    405 => "Method Not Allowed",
    408 => "Request Timeout",
    409 => "Conflict",
    413 => "Content Too Large",
    422 => "Unprocessable Content",
    429 => "Too Many Requests",
    431 => "Request Header Fields Too Large",
    500 => "Internal Server Error",
    501 => "Not Implemented",
    503 => "Service Unavailable",
    504 => "Gateway Timeout",
    507 => "Insufficient Storage"
  }

  @doc "The client at a socket whose request has this head, or none that can be read."
  @spec client(:gen_tcp.socket(), Head.t() | nil) :: client()
  def client(socket, nil), do: %{socket: socket, keeps?: false, chunks?: true, body?: true}

  def client(socket, head) do
    new? = head.version == 1

    %{
      socket: socket,
      keeps?: new? and not Head.says?(head, "connection", "close"),
      # A client of HTTP/1.0 knows no chunks: to it the end of the connection is the end.
      chunks?: new?,
      body?: head.method != "HEAD"
    }
  end

  @doc "Tells the client that its body is wanted."
  @spec go_on(client()) :: :ok | {:error, :closed}
  def go_on(client) do
    with {:error, _reason} <- :gen_tcp.send(client.socket, "HTTP/1.1 100 Continue\r\n\r\n"),
         do: {:error, :closed}
  end

  @doc "Sends an answer. It is `:broken` where the client did not take it, or it did not come to its end."
  @spec send(client(), VLLM.OpenAI.answer()) :: :whole | :broken
  def send(client, {status, headers, body}) when is_binary(body) do
    head = head(client, status, length(status, body) ++ headers)
    sent(:gen_tcp.send(client.socket, if(client.body?, do: [head, body], else: head)))
  end

  def send(client, {status, headers, body}) do
    headers = if client.chunks?, do: [{"transfer-encoding", "chunked"} | headers], else: headers

    with :ok <- :gen_tcp.send(client.socket, head(client, status, headers)),
         :ok <- pieces(client, body) do
      if client.chunks?, do: sent(:gen_tcp.send(client.socket, "0\r\n\r\n")), else: :whole
    else
      {:error, _reason} -> :broken
    end
  rescue
    # Of a body that breaks off.
    _broken in Error -> :broken
  end

  defp pieces(client, body) do
    Enum.reduce_while(body, :ok, fn piece, :ok ->
      case :gen_tcp.send(client.socket, piece(client, piece)) do
        :ok -> {:cont, :ok}
        error -> {:halt, error}
      end
    end)
  end

  # An empty chunk is the last one.
  defp piece(_client, ""), do: ""
  defp piece(%{chunks?: false}, piece), do: piece

  defp piece(_client, piece),
    do: [piece |> byte_size() |> Integer.to_string(16), "\r\n", piece, "\r\n"]

  # An answer without content has no length either.
  defp length(204, _body), do: []
  defp length(_status, body), do: [{"content-length", Integer.to_string(byte_size(body))}]

  defp head(client, status, headers) do
    headers = if client.keeps?, do: headers, else: [{"connection", "close"} | headers]
    lines = for {name, value} <- headers, do: [name, ": ", value, "\r\n"]
    ["HTTP/1.1 ", Integer.to_string(status), " ", phrase(status), "\r\n", lines, "\r\n"]
  end

  # Of another, which vLLM's app may give, clients read the number.
  defp phrase(status), do: Map.get(@phrases, status, "")

  defp sent(:ok), do: :whole
  defp sent({:error, _reason}), do: :broken
end
