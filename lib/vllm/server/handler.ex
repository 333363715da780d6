# Without inets there is no record of httpd's to be compiled with.
if Code.ensure_loaded?(:httpd) do
  defmodule VLLM.Server.Handler do
    @moduledoc false
    # A module of httpd's: what is done with a request. It runs in the process of
    # the connection, which only watches whether the client is still there. The
    # request has a process of its own, which writes to the socket itself and so
    # waits for a client that does not read; when it is killed, the engine hears
    # of it as of any caller's death, and aborts what it computes.

    require Record

    alias VLLM.OpenAI

    Record.defrecordp(:mod, Record.extract(:mod, from_lib: "inets/include/httpd.hrl"))

    # How long a client may take to read what waits for it, in ms.
    @send_timeout 60_000

    @doc false
    def unquote(:do)(info) do
      socket = mod(info, :socket)
      core = :httpd_util.lookup(mod(info, :config_db), :vllm)
      keeps? = mod(info, :connection) == true and mod(info, :http_version) == 'HTTP/1.1'
      request = request(info)
      serve = fn -> exit({:shutdown, serve(core, request, socket, keeps?)}) end
      {pid, monitor} = :erlang.spawn_opt(serve, [:monitor])
      watchdog = watch_over(pid)

      :ok =
        :inet.setopts(socket,
          active: :once,
          send_timeout: @send_timeout,
          send_timeout_close: true
        )

      sent = await(pid, monitor, socket)
      Process.exit(watchdog, :kill)

      # What has begun to be sent and did not end must not look whole.
      if sent != :whole or not keeps?, do: send(self(), {:tcp_closed, socket})
      {:proceed, [response: {:already_sent, 200, 0}]}
    end

    defp request(info) do
      {path, query} =
        case info |> mod(:request_uri) |> to_string() |> String.split("?", parts: 2) do
          [path, query] -> {path, query}
          [path] -> {path, ""}
        end

      %{
        method: to_string(mod(info, :method)),
        path: path,
        query: query,
        headers:
          for({name, value} <- mod(info, :parsed_header), do: {to_string(name), bytes(value)}),
        body: bytes(mod(info, :entity_body))
      }
    end

    defp bytes(list), do: :erlang.list_to_binary([list])

    # The connection may be ended by its supervisor, or by a fault of httpd's.
    defp watch_over(pid) do
      connection = self()

      spawn(fn ->
        monitor = Process.monitor(connection)

        receive do
          {:DOWN, ^monitor, :process, _pid, _reason} -> Process.exit(pid, :kill)
        end
      end)
    end

    # What a client sends meanwhile stays in the mailbox, for its turn.
    defp await(pid, monitor, socket) do
      receive do
        {:DOWN, ^monitor, :process, ^pid, {:shutdown, sent}} ->
          sent

        {:DOWN, ^monitor, :process, ^pid, _fault} ->
          :broken

        {:tcp_closed, ^socket} ->
          Process.exit(pid, :kill)
          await(pid, monitor, socket)

        # The server is being stopped.
        {:EXIT, _from, reason} ->
          Process.exit(pid, :kill)
          # Or httpd would send an error of its own, into what has been sent.
          :gen_tcp.close(socket)
          exit(reason)

        {:tcp_error, ^socket, _reason} ->
          Process.exit(pid, :kill)
          await(pid, monitor, socket)
      end
    end

    defp serve(core, request, socket, keeps?) do
      {status, headers, body} = OpenAI.answer(core, request)
      headers = if keeps?, do: headers, else: [{"connection", "close"} | headers]
      send_answer(socket, status, headers, body)
    end

    defp send_answer(socket, status, headers, body) when is_binary(body) do
      head = head(status, [{"content-length", Integer.to_string(byte_size(body))} | headers])
      if :gen_tcp.send(socket, [head, body]) == :ok, do: :whole, else: :broken
    end

    defp send_answer(socket, status, headers, body) do
      :ok = :gen_tcp.send(socket, head(status, [{"transfer-encoding", "chunked"} | headers]))

      sent =
        Enum.reduce_while(body, :ok, fn piece, :ok ->
          size = piece |> byte_size() |> Integer.to_string(16)

          case :gen_tcp.send(socket, [size, "\r\n", piece, "\r\n"]) do
            :ok -> {:cont, :ok}
            {:error, _reason} -> {:halt, :broken}
          end
        end)

      if sent == :ok and :gen_tcp.send(socket, "0\r\n\r\n") == :ok, do: :whole, else: :broken
    end

    defp head(status, headers) do
      lines = for {name, value} <- headers, do: [name, ": ", value, "\r\n"]
      ["HTTP/1.1 #{status} ", :httpd_util.reason_phrase(status), "\r\n", lines, "\r\n"]
    end
  end
end
