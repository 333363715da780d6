# Without inets there is no record of httpd's to be compiled with.
if Code.ensure_loaded?(:httpd) do
  defmodule VLLM.Server.Handler do
    @moduledoc false
    # A module of httpd's: what is done with a request. It runs in the process of
    # the connection, which gathers the body, in parts of which the first is enough
    # to refuse it, and then only watches whether the client is still there. The
    # request has a process of its own, which writes to the socket itself and so
    # waits for a client that does not read; when it is killed, the engine hears
    # of it as of any caller's death, and aborts what it computes.

    require Record

    alias VLLM.OpenAI.Refusal
    alias VLLM.Server.{Headers, Hosts}
    alias VLLM.Web

    Record.defrecordp(:mod, Record.extract(:mod, from_lib: "inets/include/httpd.hrl"))

    # How long a client may take to read what waits for it, in ms.
    @send_timeout 60_000

    # What is kept of what a client sends before it has its answer, in bytes.
    @ahead 65_536

    # httpd asks for each part of a body of more than `max_client_body_chunk`, then for
    # the end of any. What it is given back (none may be missing, or it crashes) comes
    # along with the next part: those that there were, or that the request is refused.
    @doc false
    def unquote(:do)(info) do
      case mod(info, :entity_body) do
        {:first, part} ->
          part(info, part, :undefined)

        {:continue, part, parts} ->
          part(info, part, parts)

        {:last, part, :undefined} ->
          whole(info, part)

        {:last, _part, :refused} ->
          proceed(info, false)

        {:last, part, parts} ->
          whole(info, [part | parts] |> Enum.reverse() |> :erlang.list_to_binary())
      end
    end

    defp part(_info, _part, :refused), do: {:continue, :refused}

    defp part(info, part, :undefined) do
      prepare(info)
      request = request(info, "")

      case refused(info, request) || Web.refused(served(info).core, request) do
        nil ->
          Headers.start_body_timer()
          {:continue, [part]}

        answer ->
          _ = send_answer(%{client(info) | keeps?: false}, answer)
          # A client that is still sending would not see it if the connection were closed now.
          _ = :gen_tcp.shutdown(mod(info, :socket), :write)
          {:continue, :refused}
      end
    end

    defp part(_info, part, parts) do
      Headers.start_body_timer()
      {:continue, [part | parts]}
    end

    defp whole(info, body) do
      Headers.stop_body_timer()
      prepare(info)
      client = client(info)
      request = request(info, body)
      core = served(info).core

      serve = fn ->
        answer = refused(info, request) || Web.answer(core, request)
        exit({:shutdown, send_answer(client, answer)})
      end

      {pid, monitor} = :erlang.spawn_opt(serve, [:monitor])
      watchdog = watch_over(pid)
      watch(client.socket)
      {sent, ahead} = await(pid, monitor, client.socket, [])
      Process.exit(watchdog, :kill)
      give_back(client.socket, ahead)
      # What has begun to be sent and did not end must not look whole.
      proceed(info, sent == :whole and client.keeps?)
    end

    defp proceed(info, keeps?) do
      if not keeps?, do: send(self(), {:tcp_closed, mod(info, :socket)})
      {:proceed, [response: {:already_sent, 200, 0}]}
    end

    defp served(info), do: :httpd_util.lookup(mod(info, :config_db), :vllm)

    # What is known before the body is there.
    defp refused(info, request) do
      %{core: core, hosts: hosts, max_body_bytes: limit} = served(info)

      cond do
        not Hosts.allowed?(hosts, request.headers) ->
          Web.refusal(core, request, Refusal.wrong_host())

        content_length(info) > limit ->
          Web.refusal(core, request, Refusal.too_large(limit))

        true ->
          nil
      end
    end

    defp content_length(info) do
      case List.keyfind(mod(info, :parsed_header), 'content-length', 0) do
        {_name, length} -> List.to_integer(length)
        nil -> 0
      end
    end

    # Where the answer goes, and how.
    defp client(info) do
      new? = mod(info, :http_version) == 'HTTP/1.1'

      %{
        socket: mod(info, :socket),
        keeps?: new? and mod(info, :connection) == true,
        chunks?: new?,
        body?: mod(info, :method) != 'HEAD'
      }
    end

    defp request(info, body) do
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
          for({name, value} <- mod(info, :parsed_header), do: {to_string(name), value(value)}),
        body: body
      }
    end

    defp value(hidden) when is_function(hidden, 0), do: value(hidden.())
    defp value(list), do: :erlang.list_to_binary(list)

    # A client that is gone without a word is noticed in the end.
    defp prepare(info) do
      options = [send_timeout: @send_timeout, send_timeout_close: true, keepalive: true]
      _ = :inet.setopts(mod(info, :socket), options)
    end

    # Whatever comes next on the socket, its end among it, becomes a message.
    defp watch(socket) do
      if :inet.setopts(socket, active: :once) != :ok, do: send(self(), {:tcp_closed, socket})
    end

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

    # What a client sends meanwhile is kept for its turn.
    defp await(pid, monitor, socket, ahead) do
      receive do
        {:DOWN, ^monitor, :process, ^pid, {:shutdown, sent}} ->
          {sent, ahead}

        {:DOWN, ^monitor, :process, ^pid, _fault} ->
          {:broken, ahead}

        {:tcp, ^socket, data} ->
          ahead = [data | ahead]
          if :erlang.iolist_size(ahead) < @ahead, do: watch(socket)
          await(pid, monitor, socket, ahead)

        {:tcp_closed, ^socket} ->
          Process.exit(pid, :kill)
          await(pid, monitor, socket, ahead)

        # The server is being stopped.
        {:EXIT, _from, reason} ->
          Process.exit(pid, :kill)
          # Or httpd would send an error of its own, into what has been sent.
          :gen_tcp.close(socket)
          exit(reason)

        {:tcp_error, ^socket, _reason} ->
          Process.exit(pid, :kill)
          await(pid, monitor, socket, ahead)
      end
    end

    # In the parts in which it came: httpd waits for ever for a body that ends within one.
    defp give_back(socket, ahead) do
      _ = :inet.setopts(socket, active: false)

      receive do
        {:tcp, ^socket, data} -> give_back(socket, [data | ahead])
      after
        0 -> for data <- Enum.reverse(ahead), do: send(self(), {:tcp, socket, data})
      end
    end

    defp send_answer(client, {status, headers, body}) do
      headers = if client.keeps?, do: headers, else: [{"connection", "close"} | headers]
      send_answer(client, status, headers, body)
    end

    defp send_answer(client, status, headers, body) when is_binary(body) do
      head = head(status, [{"content-length", Integer.to_string(byte_size(body))} | headers])
      sent(:gen_tcp.send(client.socket, if(client.body?, do: [head, body], else: head)))
    end

    defp send_answer(client, status, headers, body) do
      headers = if client.chunks?, do: [{"transfer-encoding", "chunked"} | headers], else: headers

      :ok = :gen_tcp.send(client.socket, head(status, headers))

      sent =
        Enum.reduce_while(body, :ok, fn piece, :ok ->
          case :gen_tcp.send(client.socket, chunk(client, piece)) do
            :ok -> {:cont, :ok}
            {:error, reason} -> {:halt, {:error, reason}}
          end
        end)

      if sent == :ok and client.chunks?,
        do: sent(:gen_tcp.send(client.socket, "0\r\n\r\n")),
        else: sent(sent)
    end

    # A client of HTTP/1.0 knows no chunks: to it the end of the connection is the end.
    defp chunk(%{chunks?: false}, piece), do: piece

    defp chunk(_client, piece),
      do: [piece |> byte_size() |> Integer.to_string(16), "\r\n", piece, "\r\n"]

    defp sent(:ok), do: :whole
    defp sent({:error, _reason}), do: :broken

    defp head(status, headers) do
      lines = for {name, value} <- headers, do: [name, ": ", value, "\r\n"]
      ["HTTP/1.1 #{status} ", phrase(status), "\r\n", lines, "\r\n"]
    end

    # Which httpd does not know.
    defp phrase(429), do: "Too Many Requests"
    defp phrase(status), do: :httpd_util.reason_phrase(status)
  end
end
