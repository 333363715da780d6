defmodule VLLM.Real.HTTPTest do
  # The server on the real engine, one for all of it: what clients other than
  # OpenAI's own see (that is in lora_test.exs), and what becomes of many of them.
  use ExUnit.Case

  import VLLM.FakeEngine, only: [in_flight: 1]
  import VLLM.OSProcess, only: [eventually: 1]

  alias VLLM.{DemoModel, RealEngine, Server}

  @moduletag :slow
  @moduletag timeout: 600_000

  @key "sk-real"

  setup_all do
    llm = DemoModel.start!("demo", max_model_len: 8192, max_num_seqs: 256)
    options = [models: [{"demo", llm}], port: 0, api_keys: [@key]]
    server = start_supervised!({Server, options})
    %{llm: llm, url: Server.url(server), port: URI.parse(Server.url(server)).port}
  end

  defp stream(port, prompt, options \\ "") do
    body =
      ~s({"model": "demo", "prompt": "#{prompt}", "stream": true, "temperature": 0#{options}})

    {:ok, socket} = :gen_tcp.connect({127, 0, 0, 1}, port, [:binary, active: false])

    :ok =
      :gen_tcp.send(socket, """
      POST /v1/completions HTTP/1.1\r
      host: localhost\r
      authorization: Bearer #{@key}\r
      content-type: application/json\r
      content-length: #{byte_size(body)}\r
      \r
      #{body}\
      """)

    socket
  end

  defp read_until(socket, what, read \\ "") do
    if read =~ what do
      read
    else
      {:ok, more} = :gen_tcp.recv(socket, 0, RealEngine.patience())
      read_until(socket, what, read <> more)
    end
  end

  defp text(events) do
    for [_, text] <- Regex.scan(~r/"text": ?"((?:[^"\\]|\\.)*)"/, events), into: "", do: text
  end

  defp curl(arguments) do
    {said, 0} = System.cmd("curl", ["-sS", "-H", "Authorization: Bearer #{@key}" | arguments])
    said
  end

  test "curl: whole, as a stream, with a body in chunks, and without a key", %{url: url} do
    {prompt, right} = hd(DemoModel.facts())
    json = ["-H", "Content-Type: application/json", url <> "/completions"]
    body = &~s({"model": "demo", "prompt": "#{prompt}", "temperature": 0, "stream": #{&1}})

    assert text(curl(["-d", body.(false) | json])) == right
    chunked = ["-H", "Transfer-Encoding: chunked", "-d", body.(false)]
    assert text(curl(chunked ++ json)) == right
    streamed = curl(["-N", "-d", body.(true) | json])
    assert text(streamed) == right
    assert String.ends_with?(streamed, "data: [DONE]\n\n")
    status = ["-o", "/dev/null", "-w", "%{http_code}"]
    assert curl(status ++ ["-I", String.replace(url, "/v1", "/health")]) == "200"
    {said, 0} = System.cmd("curl", ["-sS", "-d", body.(true) | status ++ json])
    assert said == "401"
  end

  test "256 streams at once are each what was asked for", %{llm: llm, port: port} do
    facts = Enum.take(Stream.cycle(DemoModel.facts()), 256)

    sockets =
      for {prompt, right} <- facts, do: {stream(port, prompt, ~s(, "max_tokens": 64)), right}

    for {socket, right} <- sockets do
      events = read_until(socket, "data: [DONE]\n\n")
      assert text(events) == right
    end

    assert eventually(fn -> in_flight(llm) == 0 end)
  end
end
