defmodule VLLM.ServerTest do
  use ExUnit.Case, async: true
  doctest VLLM.Server, only: [child_spec: 1]
  doctest VLLM.Server.Hosts

  import VLLM.FakeEngine
  import VLLM.OSProcess, only: [eventually: 1]

  alias VLLM.{Error, Server}

  @moduletag :tmp_dir

  defp serve(options \\ []) do
    llm = start!()
    server = start_supervised!({Server, [models: [llm], port: 0] ++ options})
    {llm, URI.parse(Server.url(server)).port}
  end

  defp connect(port) do
    {:ok, socket} = :gen_tcp.connect({127, 0, 0, 1}, port, [:binary, active: false])
    socket
  end

  defp post(socket, steps, headers \\ "") do
    body = ~s({"model": "ready", "prompt": "#{steps}"})

    :ok =
      :gen_tcp.send(socket, """
      POST /v1/completions HTTP/1.1\r
      host: localhost\r
      content-type: application/json\r
      content-length: #{byte_size(body)}\r
      #{headers}\r
      #{body}\
      """)

    socket
  end

  # All of a request but its body, or the beginning of that.
  defp begin(socket, headers, body \\ "") do
    head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n"
    :ok = :gen_tcp.send(socket, [head, Enum.map(headers, &[&1, "\r\n"]), "\r\n", body])
    socket
  end

  # The processes of a server's connections.
  defp connections(port) do
    name = :httpd_util.make_name('httpd_connection_sup', {127, 0, 0, 1}, port)
    for {_id, pid, _type, _modules} <- Supervisor.which_children(name), do: pid
  end

  # What has come when `ending` is there.
  defp read_until(socket, ending, read \\ "") do
    if String.ends_with?(read, ending) do
      read
    else
      {:ok, more} = :gen_tcp.recv(socket, 0, 20_000)
      read_until(socket, ending, read <> more)
    end
  end

  test "an answer in one piece, and others on the same connection" do
    {_llm, port} = serve()
    socket = connect(port)

    for word <- ["one", "two"] do
      answer = socket |> post("answer:200:#{word}") |> read_until(word)
      assert ["HTTP/1.1 200 OK", headers] = String.split(answer, "\r\n", parts: 2)
      assert headers =~ "content-length: 3\r\n"
      assert headers =~ "content-type: application/json\r\n"
    end
  end

  test "what a client sends before it has its answer waits for its turn" do
    {_llm, port} = serve()
    socket = connect(port)
    post(socket, "head:200;chunk:three;sleep:0.2;end")
    read_until(socket, "three\r\n")
    post(socket, "answer:200:four")
    assert read_until(socket, "four") =~ "0\r\n\r\nHTTP/1.1 200 OK"
  end

  test "a client that wants no more has its connection closed" do
    {_llm, port} = serve()
    socket = port |> connect() |> post("answer:200:one", "connection: close\r\n")
    assert read_until(socket, "one") =~ "connection: close\r\n"
    assert {:error, :closed} = :gen_tcp.recv(socket, 0, 20_000)
  end

  test "a stream comes as it is made" do
    {llm, port} = serve()
    socket = port |> connect() |> post("head:200;chunk:one;hold")
    begun = read_until(socket, "one\r\n")
    assert begun =~ "transfer-encoding: chunked\r\n"
    assert begun =~ "content-type: text/event-stream\r\n"
    # Nothing has ended it yet.
    await_held(llm, 1)
    socket = port |> connect() |> post("head:200;chunk:one;chunk:two;end")
    assert read_until(socket, "0\r\n\r\n") =~ "\r\n\r\n3\r\none\r\n3\r\ntwo\r\n0\r\n\r\n"
    assert socket |> post("answer:200:yes") |> read_until("yes")
  end

  test "HEAD has the head of an answer, after which comes the next" do
    {_llm, port} = serve(api_keys: ["sk-secret"])
    socket = connect(port)
    head = &(:ok = :gen_tcp.send(socket, "HEAD #{&1} HTTP/1.1\r\nhost: localhost\r\n\r\n"))

    for {path, status, length} <- [{"/health", 200, "3"}, {"/metrics", 401, "\\d+"}] do
      head.(path)
      answer = read_until(socket, "\r\n\r\n")
      assert answer =~ ~r/\AHTTP\/1.1 #{status} .*\r\ncontent-length: #{length}\r\n/s
    end

    :ok = :gen_tcp.send(socket, "GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
    assert "HTTP/1.1 200 OK" <> _ = read_until(socket, "\r\n\r\nok\n")
  end

  test "to a client of HTTP/1.0 a stream is what comes until the connection ends" do
    {_llm, port} = serve()
    body = ~s({"prompt": "head:200;chunk:one;chunk:two;end"})
    socket = connect(port)

    :ok =
      :gen_tcp.send(socket, """
      POST /v1/completions HTTP/1.0\r
      content-type: application/json\r
      content-length: #{byte_size(body)}\r
      \r
      #{body}\
      """)

    answer = read_until(socket, "onetwo")
    refute answer =~ "transfer-encoding"
    assert answer =~ "connection: close\r\n"
    assert {:error, :closed} = :gen_tcp.recv(socket, 0, 20_000)
  end

  @tag :slow
  test "a client that does not read holds up its own stream, and nobody else" do
    {llm, port} = serve(max_body_bytes: 8_000_000)
    options = [:binary, active: false, recbuf: 4096]
    {:ok, socket} = :gen_tcp.connect({127, 0, 0, 1}, port, options)
    # More than the buffers between the two take of it: with the head, what is granted twice.
    chunk = "chunk:#{String.duplicate("x", 60_000)};"
    post(socket, "head:200;#{String.duplicate(chunk, 127)}end")
    assert eventually(fn -> ask(llm, "credit") in [{:ok, "0"}, {:ok, "64"}] end)
    for _ <- 1..20, do: assert(port |> connect() |> post("answer:200:yes") |> read_until("yes"))
    assert {:ok, granted} = ask(llm, "credit")
    assert granted in ["0", "64"]
    assert byte_size(read_until(socket, "0\r\n\r\n")) > 127 * 60_000
    assert eventually(fn -> ask(llm, "credit") == {:ok, "128"} end)
  end

  for {what, steps} <- [{"an answer", "hold"}, {"a stream", "head:200;chunk:one;hold"}] do
    test "a client that goes before #{what} has ended frees its place" do
      {llm, port} = serve(max_concurrent_requests: 1)
      socket = port |> connect() |> post(unquote(steps))
      await_held(llm, 1)
      refused = port |> connect() |> post("answer:200:yes") |> read_until("}\n}")
      assert "HTTP/1.1 429 Too Many Requests\r\n" <> _ = refused
      assert refused =~ "retry-after: 1\r\n"
      :ok = :gen_tcp.close(socket)
      await_held(llm, 0)
      assert eventually(fn -> in_flight(llm) == 0 end)
      assert port |> connect() |> post("answer:200:yes") |> read_until("yes")
    end
  end

  test "a client that goes is noticed though it has sent more than its request" do
    {llm, port} = serve()
    socket = port |> connect() |> post("hold")
    await_held(llm, 1)
    :ok = :gen_tcp.send(socket, "G")
    :ok = :gen_tcp.close(socket)
    await_held(llm, 0)
  end

  test "a worker that dies ends an open stream with an event, and the next request is served" do
    {_llm, port} = serve()
    socket = connect(port)
    ended = socket |> post("head:200;chunk:one;kill") |> read_until("0\r\n\r\n")
    assert ended =~ ~s(data: {"error": {"code": "engine_dead")
    assert ended =~ "data: [DONE]\n\n"
    assert socket |> post("answer:200:yes") |> read_until("yes")
  end

  test "what was queued in a worker that dies is served after the restart", %{tmp_dir: tmp_dir} do
    {_llm, port} = serve()
    steps = "once:#{tmp_dir}/died:kill;answer:200:yes"
    assert "HTTP/1.1 200 OK" <> _ = port |> connect() |> post(steps) |> read_until("yes")
  end

  @tag :slow
  test "of 256 streams at once those that are left are aborted, and a death ends the others with an event" do
    {llm, port} = serve()
    sockets = for _ <- 1..256, do: port |> connect() |> post("head:200;chunk:one;hold")
    for socket <- sockets, do: read_until(socket, "one\r\n")
    await_held(llm, 256)
    {gone, stay} = Enum.split(sockets, 128)
    Enum.each(gone, &:gen_tcp.close/1)
    await_held(llm, 128)
    killed = port |> connect() |> post("kill") |> read_until("}\n}")
    assert "HTTP/1.1 500 " <> _ = killed
    assert killed =~ ~s("code": "poison")
    for socket <- stay, do: assert(read_until(socket, "0\r\n\r\n") =~ ~s("code": "engine_dead"))
    assert port |> connect() |> post("answer:200:yes") |> read_until("yes")
  end

  test "whatever bytes come, the next request is served and no connection is left" do
    {_llm, port} = serve()
    :rand.seed(:exsss, {1, 2, 3})

    whole =
      "POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n" <>
        ~s(content-length: 44\r\n\r\n{"model": "ready", "prompt": "answer:200:yes"})

    for _ <- 1..200 do
      at = :rand.uniform(byte_size(whole)) - 1
      <<start::binary-size(at), _, rest::binary>> = whole
      byte = :rand.uniform(256) - 1
      socket = connect(port)
      _ = :gen_tcp.send(socket, Enum.random([start, start <> rest, start <> <<byte>> <> rest]))
      # What it is answered, if there is anything to answer.
      with {:ok, answer} <- :gen_tcp.recv(socket, 0, 5),
           do: assert(Regex.run(~r/\AHTTP\/1\.[01] [245]\d\d /, answer), inspect(answer))

      :gen_tcp.close(socket)
    end

    assert port |> connect() |> post("answer:200:yes") |> read_until("yes")
    # That one is still open.
    assert eventually(fn -> length(connections(port)) == 1 end)
  end

  test "requests end with the server, and nothing of them is left" do
    {llm, port} = serve()
    socket = port |> connect() |> post("head:200;chunk:one;hold")
    read_until(socket, "one\r\n")
    :ok = stop_supervised({Server, 0})
    assert {:error, :closed} = :gen_tcp.recv(socket, 0, 20_000)
    await_held(llm, 0)
    assert {:error, :econnrefused} = :gen_tcp.connect({127, 0, 0, 1}, port, [])
  end

  test "a body that is too large, and a method that there is not" do
    {_llm, port} = serve(max_body_bytes: 100)
    socket = port |> connect() |> post("answer:200:#{String.duplicate("x", 100)}")
    refused = read_until(socket, "}\n}")
    assert "HTTP/1.1 413 " <> _ = refused
    assert refused =~ ~s("code": "body_too_large")
    # It was read nevertheless.
    assert socket |> post("answer:200:yes") |> read_until("yes")
    socket = connect(port)
    :ok = :gen_tcp.send(socket, "BREW /v1/models HTTP/1.1\r\nhost: localhost\r\n\r\n")
    assert {:ok, "HTTP/1.1 501 " <> _} = :gen_tcp.recv(socket, 0, 20_000)
    assert port |> connect() |> post("answer:200:yes") |> read_until("yes")
  end

  for {what, options, length, status} <- [
        {"that is too large", [], 5_000_000, 413},
        {"of a client without a key", [api_keys: ["sk-secret"]], 4_000_000, 401}
      ] do
    test "a body #{what} is refused before it is there" do
      {_llm, port} = serve(unquote(options))
      rest = unquote(length) - 65_536
      part = String.duplicate("x", 65_536)
      socket = port |> connect() |> begin(["content-length: #{unquote(length)}"], part)
      refused = read_until(socket, "}\n}")
      assert String.starts_with?(refused, "HTTP/1.1 #{unquote(status)} ")
      assert refused =~ "connection: close\r\n"
      # What still comes is not kept, and then the connection ends.
      :ok = :gen_tcp.send(socket, String.duplicate("x", rest - 1))
      [connection] = connections(port)

      {:binary, binaries} = Process.info(connection, :binary)
      assert binaries |> Enum.map(&elem(&1, 1)) |> Enum.sum() < 1_000_000
      :ok = :gen_tcp.send(socket, "x")
      assert {:error, :closed} = :gen_tcp.recv(socket, 0, 20_000)
      assert eventually(fn -> connections(port) == [] end)
    end
  end

  test "a body whose length is not told is refused, since it has no limit" do
    {_llm, port} = serve()
    socket = port |> connect() |> begin(["transfer-encoding: chunked"], "7FFFFFF\r\nxxx")
    assert {:ok, "HTTP/1.1 501 " <> _} = :gen_tcp.recv(socket, 0, 20_000)
  end

  test "a body of several parts is what was sent, and takes little more memory than it has bytes" do
    {llm, port} = serve()
    text = for number <- 1..30_000, into: "", do: "#{number}, "
    socket = port |> connect() |> post("answer:200:#{text}")
    assert "HTTP/1.1 200 OK" <> _ = read_until(socket, text)
    post(socket, "hold:#{String.duplicate(text, 10)}")
    await_held(llm, 1)

    for connection <- connections(port) do
      assert {:memory, bytes} = Process.info(connection, :memory)
      assert bytes < 1_000_000
    end

    :gen_tcp.close(socket)
  end

  test "a body that does not come is not waited for" do
    {_llm, port} = serve()

    timer = fn ->
      with [connection] <- connections(port),
           {:dictionary, entries} <- Process.info(connection, :dictionary),
           timer when timer != nil <- entries[VLLM.Server.Headers],
           do: {connection, timer}
    end

    # Whether it has begun or not, and one part more begins the time anew.
    for body <- ["", "x", String.duplicate("x", 65_537)] do
      socket = port |> connect() |> begin(["content-length: 100000"], body)
      assert eventually(fn -> match?({_, _}, timer.()) end)
      {connection, timer} = timer.()
      assert Process.cancel_timer(timer) in 1..60_000
      send(connection, :timeout)
      assert {:ok, "HTTP/1.1 408 " <> _} = :gen_tcp.recv(socket, 0, 20_000)
      assert eventually(fn -> connections(port) == [] end)
    end

    # Nor does it end a connection whose body has come.
    socket = connect(port)
    assert socket |> post("answer:200:yes") |> read_until("yes")
    assert timer.() == nil
  end

  test "the admin API is served beside it, with its errors and its events" do
    {llm, port} = serve(web: true, api_keys: [{"sk-admin", admin: true}, "sk-plain"])
    key = "authorization: Bearer sk-admin\r\n"

    ask = fn request, headers ->
      socket = connect(port)
      :ok = :gen_tcp.send(socket, [request, " HTTP/1.1\r\nhost: localhost\r\n", headers, "\r\n"])
      socket
    end

    assert "HTTP/1.1 200 OK" <> told = "GET /api/v1/engines" |> ask.(key) |> read_until("\n}")
    assert told =~ ~s("id": "#{VLLM.Web.Engine.id(llm.id)}")
    assert told =~ "cache-control: no-store\r\n"
    assert "HTTP/1.1 401 " <> _ = "GET /api/v1/engines" |> ask.("") |> read_until("\n}")
    delete = "DELETE /api/v1/quantize/jobs/x?outputs=true"
    assert "HTTP/1.1 403 " <> _ = delete |> ask.(key) |> read_until("\n}")

    assert "HTTP/1.1 404 " <> none =
             delete |> ask.(["x-requested-with: vllm\r\n" | key]) |> read_until("\n}")

    assert none =~ ~s("reason": "job_not_found")

    # What is refused before its body is there has the same shape.
    long = [
      "content-type: application/json\r\ncontent-length: 9000000\r\n",
      key,
      "\r\n",
      String.duplicate("x", 65_536)
    ]

    refused = "POST /api/v1/engines" |> ask.(long) |> read_until("\n}")
    assert "HTTP/1.1 413 " <> _ = refused
    assert refused =~ ~s("reason": "body_too_large")

    # One who reads events is noticed when he goes.
    events = ask.("GET /api/v1/events", key)
    assert read_until(events, "\n\n\r\n") =~ "event: state\ndata: {"
    assert [_place] = places()
    :ok = :gen_tcp.close(events)
    assert eventually(fn -> places() == [] end)
  end

  # Of those who read events.
  defp places, do: Registry.select(VLLM.Places, [{{{{:_, :events}, :_}, :"$1", :_}, [], [:"$1"]}])

  test "a port that is taken is an error, and so are wrong options" do
    {_llm, port} = serve()
    Process.flag(:trap_exit, true)

    assert {:error, %Error{reason: :invalid_option} = error} =
             Server.start_link(models: [:a], port: port)

    assert error.message =~ "cannot listen on 127.0.0.1, port #{port}. Something else does"
    assert {:error, %Error{} = error} = Server.start_link(models: [:a], prt: 1)
    assert error.message =~ "Did you mean `port`?"

    assert_raise Error, ~r/`ip` must be an address/, fn ->
      Server.child_spec(models: [:a], ip: "all")
    end
  end

  test "without keys only this machine's own names are taken, or those that are given" do
    ask = fn port, host ->
      socket = connect(port)
      :ok = :gen_tcp.send(socket, "GET /health HTTP/1.1\r\nhost: #{host}\r\n\r\n")
      {:ok, "HTTP/1.1 " <> <<status::binary-size(3)>> <> _} = :gen_tcp.recv(socket, 0, 20_000)
      status
    end

    {_llm, port} = serve()
    here = ["localhost", "LOCALHOST:1", "127.0.0.1:8000", "[::1]", "a.localhost", "127.1.2.3"]
    for host <- here, do: assert({host, ask.(port, host)} == {host, "200"})

    there = [
      "evil.example",
      "localhost.evil.example",
      "127.0.0.1.evil.example:80",
      "10.0.0.1",
      "\xff"
    ]

    for host <- there, do: assert({host, ask.(port, host)} == {host, "403"})
    stop_supervised!({Server, 0})

    for {options, host, status} <- [
          {[hosts: ["llm.example", "*.lan"]], "llm.example:80", "200"},
          {[hosts: ["llm.example", "*.lan"]], "box.lan", "200"},
          {[hosts: ["llm.example", "*.lan"]], "localhost", "403"},
          {[api_keys: ["sk-secret"]], "evil.example", "200"},
          {[ip: {0, 0, 0, 0}], "evil.example", "200"}
        ] do
      server = start_supervised!({Server, [models: [:a], port: 0] ++ options})
      assert {options, ask.(URI.parse(Server.url(server)).port, host)} == {options, status}
      stop_supervised!({Server, 0})
    end
  end

  test "keys are in no report of the server's" do
    {_llm, port} = serve(api_keys: ["sk-secret"])
    {:ok, supervisor} = ExUnit.fetch_test_supervisor()
    {:ok, spec} = :supervisor.get_childspec(supervisor, {Server, 0})
    refute inspect(spec) =~ "sk-secret"
    answer = port |> connect() |> post("answer:200:yes", "authorization: Bearer sk-secret\r\n")
    assert read_until(answer, "yes")

    assert "HTTP/1.1 401 " <> _ =
             port |> connect() |> post("answer:200:yes") |> read_until("}\n}")
  end

  test "keys are in no log, not even where httpd has a fault" do
    {_llm, port} = serve(api_keys: ["sk-secret"], max_body_bytes: 50)

    log =
      ExUnit.CaptureLog.capture_log(fn ->
        # A length that httpd's own limit crashes at.
        headers = ["content-length: 50", "authorization: Bearer sk-secret"]
        expecting = port |> connect() |> begin(["expect: 100-continue" | headers])
        assert {:ok, "HTTP/1.1 100 " <> _} = :gen_tcp.recv(expecting, 0, 20_000)
        [connection] = connections(port)
        monitor = Process.monitor(connection)
        catch_exit(GenServer.call(connection, :unknown))
        assert_receive {:DOWN, ^monitor, :process, _pid, {:call_api_violation, _, _}}, 20_000
      end)

    assert log =~ "call_api_violation"
    assert log =~ "content-length"
    refute log =~ "sk-secret"
  end
end
