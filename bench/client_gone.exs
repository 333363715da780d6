# How soon what a client had is free once it has gone: its place among `max_concurrent_requests`, its request on the
# bridge, and its sequence in vLLM, by vLLM's own gauge of running requests. Another stream runs all the while, so that the
# engine is busy and the gauge, which vLLM sets at each step, moves. Clients ask for a whole answer or a stream of
# 8,000 tokens, and go by FIN or by RST.
#
#     MIX_ENV=test mix run bench/client_gone.exs [TIMES]
#
# Through `VLLM.Server`, and through `VLLM.Plug` where Plug and Bandit are found (`ERL_LIBS`), whole answers but for the latter:
# Bandit looks for its client only when it writes.

Logger.configure(level: :error)

defmodule Bench.ClientGone do
  alias VLLM.Bench.Statistics
  alias VLLM.{DemoModel, FakeEngine, HTTPClient, Server}

  # How often it is looked whether what is awaited has come, in ms: the figures are exact to that.
  @interval 1
  @patience 30_000

  @endless [max_tokens: 8000, ignore_eos: true]

  def run(times) do
    llm = DemoModel.start!("demo", max_model_len: 8192)
    models = [{"demo", llm}]
    limits = [models: models, max_concurrent_requests: 100]
    {:ok, server} = Server.start_link([port: 0] ++ limits)
    IO.puts("| front | answer | goes by | place: p50, p95, most | bridge | vLLM |")
    IO.puts("| --- | --- | --- | --- | --- | --- |")
    ours = URI.parse(Server.url(server)).port

    for kind <- [:whole, :stream],
        how <- [:fin, :rst],
        do: row("VLLM.Server", ours, kind, how, llm, times)

    if bandit = bandit(limits),
      do: for(how <- [:fin, :rst], do: row("VLLM.Plug, Bandit", bandit, :stream, how, llm, times))

    VLLM.stop(llm)
  end

  defp row(front, port, kind, how, llm, times) do
    other = Task.async(fn -> VLLM.stream!(llm, "Count:", @endless) |> Stream.run() end)
    await(fn -> running(llm) == 1 end)

    [places, bridge, vllm] =
      Enum.zip_with(for(_ <- 1..times, do: once(port, kind, how, llm)), & &1)

    Task.shutdown(other, :brutal_kill)

    IO.puts(
      "| #{front} | #{kind} | #{how} | #{figures(places)} | #{figures(bridge)} | #{figures(vllm)} |"
    )
  end

  # The ms until each is free.
  defp once(port, kind, how, llm) do
    socket = HTTPClient.connect(port)
    ask(socket, kind)
    await(fn -> running(llm) == 2 end)
    begin = System.monotonic_time(:microsecond)
    leave(socket, how)
    since = fn -> (System.monotonic_time(:microsecond) - begin) / 1000 end

    figures =
      for free? <- [
            fn -> Registry.count(VLLM.Places) == 0 end,
            fn -> FakeEngine.in_flight(llm) == 1 end,
            fn -> running(llm) == 1 end
          ] do
        await(free?)
        since.()
      end

    :gen_tcp.close(socket)
    figures
  end

  defp ask(socket, kind) do
    body =
      ~s({"model": "demo", "prompt": "Count:", "max_tokens": 8000, "ignore_eos": true, "stream": #{kind == :stream}})

    HTTPClient.post(socket, "/v1/completions", body)
    if kind == :stream, do: {:ok, _head} = :gen_tcp.recv(socket, 0, @patience)
  end

  # What a client has not read makes a RST of `close`.
  defp leave(socket, :fin), do: :ok = :gen_tcp.shutdown(socket, :read_write)

  defp leave(socket, :rst) do
    :ok = :inet.setopts(socket, linger: {true, 0})
    :ok = :gen_tcp.close(socket)
  end

  defp running(llm) do
    {:ok, %{"num_requests_running" => running}} = VLLM.metrics(llm)
    running
  end

  defp await(come?, deadline \\ System.monotonic_time(:millisecond) + @patience) do
    cond do
      come?.() ->
        :ok

      System.monotonic_time(:millisecond) > deadline ->
        raise "It did not come."

      true ->
        Process.sleep(@interval)
        await(come?, deadline)
    end
  end

  defp figures(values) do
    for percent <- [50, 95, 100], into: "" do
      value = Statistics.percentile(values, percent)
      :erlang.float_to_binary(value, decimals: 1) <> if percent < 100, do: ", ", else: ""
    end
  end

  # Neither is a package of this library's: they are called by name.
  defp bandit(options) do
    if Code.ensure_loaded?(Bandit) do
      {:ok, _apps} = Application.ensure_all_started(:bandit)
      Code.compile_file(Path.expand("../lib/vllm/plug.ex", __DIR__))
      serving = [plug: {VLLM.Plug, options}, ip: :loopback, port: 0, startup_log: false]
      {:ok, server} = apply(Bandit, :start_link, [serving])
      {:ok, {_address, port}} = apply(ThousandIsland, :listener_info, [server])
      port
    end
  end
end

times = System.argv() |> List.first("50") |> String.to_integer()
Bench.ClientGone.run(times)
