defmodule VLLM.HTTPClient do
  @moduledoc "Requests over HTTP as bytes, for those who look at the connection, too."

  @doc "A connection to a server of this machine."
  @spec connect(:inet.port_number(), list()) :: :gen_tcp.socket()
  def connect(port, options \\ []) do
    {:ok, socket} = :gen_tcp.connect({127, 0, 0, 1}, port, [:binary, active: false] ++ options)

    socket
  end

  @doc "Posts JSON; gives the connection back."
  @spec post(:gen_tcp.socket(), String.t(), binary(), [String.t()]) :: :gen_tcp.socket()
  def post(socket, path, body, headers \\ []) do
    :ok =
      :gen_tcp.send(socket, [
        "POST #{path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n",
        "content-length: #{byte_size(body)}\r\n",
        Enum.map(headers, &[&1, "\r\n"]),
        "\r\n",
        body
      ])

    socket
  end
end
