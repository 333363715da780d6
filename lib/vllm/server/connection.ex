defmodule VLLM.Server.Connection do
  @moduledoc false
  # A client's connection, a process of its own: it reads one request after the
  # other, and while one is answered it only watches whether the client is still
  # there. The request has a process, too, which writes to the socket itself and so
  # waits for a client that does not read; when it is killed, the engine hears
  # of it as of any caller's death, and aborts what it computes. The two are linked:
  # neither is there without the other.

  require Logger

  alias VLLM.{Error, Web}
  alias VLLM.OpenAI.Refusal
  alias VLLM.Server.{Body, Head, Hosts, Response}

  @typedoc """
  What a connection serves. `idle` is how long the next request may take to come, `patience` how long a head or a
  piece of a body, once it has begun, in ms.
  """
  @type served :: %{
          core: VLLM.OpenAI.t(),
          hosts: Hosts.t(),
          max_body_bytes: pos_integer(),
          idle: pos_integer(),
          patience: pos_integer()
        }

  # What is kept of what a client sends before it has its answer, in bytes.
  @ahead 65_536

  # What is still read of a client that is turned away, in bytes and ms: it may send on before it reads, and a
  # connection that is closed meanwhile takes the answer with it.
  @dregs 64 * 1024 * 1024
  @dregs_patience 5_000

  @doc "Serves the client at a socket of the calling process's, until either wants no more."
  @spec serve(:gen_tcp.socket(), served()) :: :ok
  def serve(socket, served) do
    next(socket, served, "")
    :gen_tcp.close(socket)
  end

  @doc "Answers a client at once, whatever it wants, and closes its connection."
  @spec turn_away(:gen_tcp.socket(), VLLM.OpenAI.answer()) :: :ok
  def turn_away(socket, answer) do
    turn_away(socket, Response.client(socket, nil), answer)
    :gen_tcp.close(socket)
  end

  # Until something has come it may take its time.
  defp next(socket, served, "") do
    with {:ok, read} <- :gen_tcp.recv(socket, 0, served.idle), do: next(socket, served, read)
  end

  defp next(socket, served, read) do
    case head(socket, read, now() + served.patience) do
      {:ok, head, read} -> request(socket, served, head, read)
      {:error, :closed} -> :ok
      {:error, refusal} -> turn_away(socket, Refusal.answer(refusal))
    end
  end

  defp head(socket, read, deadline) do
    with :more <- Head.parse(read) do
      case :gen_tcp.recv(socket, 0, max(deadline - now(), 0)) do
        {:ok, more} -> head(socket, read <> more, deadline)
        {:error, :timeout} -> {:error, Refusal.no_body()}
        {:error, _gone} -> {:error, :closed}
      end
    end
  end

  defp request(socket, %{core: core} = served, head, read) do
    request = head |> Map.take([:method, :path, :query, :headers]) |> Map.put(:body, "")
    client = Response.client(socket, head)

    with nil <- refused(served, head, request),
         :ok <- go_on(client, head),
         {:ok, body, read} <- body(served, socket, head, read) do
      answer(client, served, %{request | body: body}, read)
    else
      {:error, :closed} -> :ok
      {:error, refusal} -> turn_away(socket, client, Web.refusal(core, request, refusal))
      answer -> turn_away(socket, client, answer)
    end
  end

  # What is known before the body is there.
  defp refused(%{core: core, hosts: hosts, max_body_bytes: limit}, head, request) do
    cond do
      not Hosts.allowed?(hosts, head.headers) ->
        {:error, Refusal.wrong_host()}

      head.length != :chunked and head.length > limit ->
        {:error, Refusal.too_large(limit)}

      # Without one there is nothing to save.
      head.length != 0 ->
        Web.refused(core, request)

      true ->
        nil
    end
  end

  # A client may ask whether it is worth sending the body.
  defp go_on(client, head) do
    if client.chunks? and Head.says?(head, "expect", "100-continue"),
      do: Response.go_on(client),
      else: :ok
  end

  defp body(served, socket, head, read) do
    source = %{socket: socket, limit: served.max_body_bytes, patience: served.patience}
    Body.read(source, head, read)
  end

  defp answer(%{socket: socket} = client, served, request, read) do
    connection = self()

    pid =
      spawn_link(fn ->
        send(connection, {self(), Response.send(client, answer(served.core, request))})
      end)

    watch(socket)

    case await(pid, socket, [read], byte_size(read)) do
      {:whole, read} when client.keeps? -> next(socket, served, read)
      # What has begun to be sent and did not end must not look whole.
      _no_more -> :ok
    end
  end

  # What a fault has to say of itself may have the request in it, and that a key.
  defp answer(core, request) do
    Web.answer(core, request)
  catch
    kind, fault ->
      what = if kind == :error, do: Exception.normalize(kind, fault).__struct__, else: kind

      where =
        for {module, function, arity, at} <- __STACKTRACE__,
            do: {module, function, if(is_list(arity), do: length(arity), else: arity), at}

      Logger.error([
        "A request over HTTP has met a fault: #{inspect(what)}\n",
        Exception.format_stacktrace(where)
      ])

      Refusal.answer(Refusal.of_error(Error.new(:internal, "A fault.", %{})))
  end

  # Whatever comes next on the socket, its end among it, becomes a message.
  defp watch(socket) do
    if :inet.setopts(socket, active: :once) != :ok, do: send(self(), {:tcp_closed, socket})
  end

  # What a client sends meanwhile is kept for its turn.
  defp await(pid, socket, ahead, size) do
    receive do
      {^pid, sent} ->
        {sent, ahead(socket, ahead)}

      {:tcp, ^socket, data} ->
        size = size + byte_size(data)
        if size < @ahead, do: watch(socket)
        await(pid, socket, [ahead, data], size)

      {:tcp_closed, ^socket} ->
        gone(pid)

      {:tcp_error, ^socket, _reason} ->
        gone(pid)
    end
  end

  defp gone(pid) do
    Process.unlink(pid)
    Process.exit(pid, :kill)
    :gone
  end

  defp ahead(socket, ahead) do
    _ = :inet.setopts(socket, active: false)

    receive do
      {:tcp, ^socket, data} -> IO.iodata_to_binary([ahead, data])
    after
      0 -> IO.iodata_to_binary(ahead)
    end
  end

  defp turn_away(socket, client, answer) do
    _ = Response.send(%{client | keeps?: false}, answer)
    _ = :gen_tcp.shutdown(socket, :write)
    drain(socket, @dregs, now() + @dregs_patience)
  end

  defp drain(socket, left, deadline) do
    case :gen_tcp.recv(socket, 0, max(deadline - now(), 0)) do
      {:ok, data} when byte_size(data) < left -> drain(socket, left - byte_size(data), deadline)
      _gone_or_enough -> :ok
    end
  end

  defp now, do: System.monotonic_time(:millisecond)
end
