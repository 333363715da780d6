defmodule VLLM.OpenAITest do
  use ExUnit.Case, async: true

  import VLLM.FakeEngine
  import VLLM.OSProcess, only: [eventually: 1]

  alias VLLM.{Error, OpenAI, Options}

  @moduletag :tmp_dir

  defp core!(options) do
    {:ok, known} = Options.only(options, Options.openai())
    {:ok, core} = OpenAI.new(known, make_ref())
    core
  end

  defp get(core, path, headers \\ []),
    do: OpenAI.answer(core, %{method: "GET", path: path, query: "", headers: headers, body: ""})

  defp post(core, path, body, headers \\ []) do
    headers = [{"content-type", "application/json"} | headers]
    OpenAI.answer(core, %{method: "POST", path: path, query: "", headers: headers, body: body})
  end

  defp complete(core, steps, model \\ "ready", headers \\ []),
    do: post(core, "/v1/completions", ~s({"model": "#{model}", "prompt": "#{steps}"}), headers)

  defp with_key(key), do: [{"authorization", "Bearer #{key}"}]

  defp code({status, _headers, body}) do
    [_, code] = Regex.run(~r/"code": "(\w+)"/, body)
    {status, code}
  end

  test "a request goes to the engine that its model names, and its answer comes back" do
    core = core!(models: [start!()])
    assert {200, [{"content-type", "application/json"}], "yes"} = complete(core, "answer:200:yes")
    # What vLLM's app refuses is passed on as it is.
    assert {422, _headers, "no"} = complete(core, "answer:422:no")
    assert {404, "model_not_found"} = core |> complete("answer:200:yes", "other") |> code()
    # The only model may stay unnamed, also where it has two names.
    two = core!(models: [start!("ready", served_model_name: ["one", "two"])])

    for core <- [core, two] do
      assert {200, _headers, "yes"} =
               post(core, "/v1/completions", ~s({"prompt": "answer:200:yes"}))
    end

    both = core!(models: [{"a", :nobody}, {"b", :nobody}])
    assert {400, "model_not_given"} = both |> post("/v1/completions", "{}") |> code()
  end

  test "an engine that answers from a script says that it does not answer HTTP, and lives on" do
    llm = VLLM.Test.start!(script: "yes")
    {status, _headers, body} = complete(core!(models: [{"ready", llm}]), "?")
    assert status == 400
    assert body =~ "Engines of VLLM.Test do not answer `http_request`."
    assert VLLM.text(hd(VLLM.generate!(llm, "?"))) == "yes"
    assert [%{state: :ready}] = VLLM.replicas!(llm)
  end

  test "what Prometheus reads is for those who have a key, unless it is few models' or the options say otherwise" do
    keys = ["all", {"few", allowed_models: ["a"]}]
    llm = start!()
    core = core!(models: [llm], api_keys: keys)
    assert {200, headers, text} = get(core, "/metrics", with_key("all"))
    assert headers == [{"content-type", "text/plain; version=0.0.4"}]
    assert text =~ "\n# TYPE vllm_bridge_up gauge\n"
    assert text =~ ~s(engine="#{inspect(llm.id)}")
    assert {401, _} = core |> get("/metrics") |> code()
    assert {404, _} = core |> get("/metrics", with_key("few")) |> code()
    assert {405, _} = core |> post("/metrics", "", with_key("all")) |> code()

    open = core!(models: [llm], api_keys: keys, metrics_without_key: true)
    assert {200, _headers, "# HELP" <> _} = get(open, "/metrics")
    assert {401, _} = open |> get("/v1/models") |> code()
    none = core!(models: [llm], metrics: false, metrics_without_key: true)
    assert {404, _} = none |> get("/metrics") |> code()
    refute "/metrics" in OpenAI.paths(none)
    assert {200, _headers, _text} = get(core!(models: [llm], allowed_models: ["a"]), "/metrics")
  end

  test "engines have names of one's own, and settings that go along" do
    models = [{"chat", start!()}, [engine: start!(), name: "tools", tool_call_parser: "hermes"]]
    core = core!(models: models)

    {200, _headers, asked} =
      complete(core, "asked", "tools", [{"traceparent", "00-1"} | with_key("k")])

    assert asked =~ "'settings': {'tool_call_parser': 'hermes'}"
    assert asked =~ "'model': 'tools'"
    assert asked =~ "[['content-type', 'application/json'], ['traceparent', '00-1']]"
    refute asked =~ "Bearer"
    assert {404, "model_not_found"} = core |> complete("asked", "ready") |> code()
    assert {400, "model_not_given"} = core |> post("/v1/completions", "{}") |> code()
    {200, _headers, list} = get(core, "/v1/models")
    assert Regex.scan(~r/"id": "(\w+)"/, list, capture: :all_but_first) == [["chat"], ["tools"]]
    {200, _headers, about} = get(core, "/v1/models/tools")
    assert about =~ ~s("root": "tools")
    assert {404, "model_not_found"} = core |> get("/v1/models/ready") |> code()

    for path <- ["/v1/models/%zz", "/v1/models/%", "/v1/models/%ff"],
        do: assert({404, "model_not_found"} = core |> get(path) |> code())
  end

  test "each path is refused without a key, but for the probe" do
    core = core!(models: [start!()], api_keys: ["right"], tokenize: true)

    for path <- OpenAI.paths(core) ++ ["/", "/invocations", "/v1/load_lora_adapter"],
        method <- ~w(GET POST PUT DELETE OPTIONS HEAD),
        headers <- [[], with_key(""), with_key("wrong"), with_key("right ")],
        path != "/health" or method not in ["GET", "HEAD"] do
      request = %{method: method, path: path, query: "", headers: headers, body: "{}"}
      assert {401, "invalid_api_key"} = core |> OpenAI.answer(request) |> code()
    end

    assert {200, _headers, "ok\n"} = get(core, "/health")
    assert {200, _headers, "yes"} = complete(core, "answer:200:yes", "ready", with_key("right"))
    assert {200, _headers, _list} = get(core, "/v1/models", [{"x-api-key", "right"}])
    refute inspect(core) =~ "right"
    refute inspect(core, structs: false) =~ "right"
  end

  test "HEAD is answered as GET is; the front leaves the body out" do
    core = core!(models: [start!()], api_keys: ["right"])
    head = &OpenAI.answer(core, %{method: "HEAD", path: &1, query: "", headers: &2, body: ""})
    assert {200, _headers, "ok\n"} = head.("/health", [])
    assert head.("/v1/models", with_key("right")) == get(core, "/v1/models", with_key("right"))
    assert {405, _headers, _body} = head.("/v1/completions", with_key("right"))
    assert {401, "invalid_api_key"} = "/metrics" |> head.([]) |> code()
  end

  test "what is not on the list is not there, whatever vLLM's app has" do
    core = core!(models: [start!()])

    for path <-
          ~w(/ /openapi.json /invocations /ping /scale_elastic_ep /tokenize /detokenize
                   /v1/load_lora_adapter /v1/completions/render /v1/completions/ /v1//completions) do
      assert {404, "not_found"} = core |> post(path, "{}") |> code()
    end

    assert {405, "method_not_allowed"} = core |> get("/v1/completions") |> code()
    assert {405, "method_not_allowed"} = core |> post("/v1/models", "{}") |> code()

    assert {200, _headers, "yes"} =
             post(
               core!(models: [start!()], tokenize: true),
               "/tokenize",
               ~s({"prompt": "answer:200:yes"})
             )
  end

  test "bodies that are no JSON object with a model" do
    core = core!(models: [start!()])

    for body <- ["", "[]", "{", ~s({"model": 1), ~s({"model": "\\x"}), ~s({"a" 1}), <<"{", 0xFF>>] do
      assert {400, "invalid_json"} = core |> post("/v1/completions", body) |> code()
    end
  end

  test "keys and the server have models that they allow" do
    models = [{"a", start!()}, {"b", start!()}, {"c", start!()}]
    keys = ["all", {"some", allowed_models: ["a", "c"]}]
    core = core!(models: models, api_keys: keys, allowed_models: [~r/\A[ab]\z/])

    for {key, allowed} <- [{"all", ["a", "b"]}, {"some", ["a"]}] do
      {200, _headers, list} = get(core, "/v1/models", with_key(key))

      assert ~r/"id": "(\w)"/ |> Regex.scan(list, capture: :all_but_first) |> List.flatten() ==
               allowed

      for name <- ["a", "b", "c"] do
        status = core |> complete("answer:200:yes", name, with_key(key)) |> elem(0)
        assert status == if(name in allowed, do: 200, else: 404)
        assert core |> get("/v1/models/#{name}", with_key(key)) |> elem(0) == status
      end
    end
  end

  test "no more requests at once than there are places, and who ends gives his back" do
    llm = start!()
    keys = [{"one", max_concurrent_requests: 1}, "other"]
    core = core!(models: [llm], api_keys: keys, max_concurrent_requests: 2)
    ask = fn key -> complete(core, "hold", "ready", with_key(key)) end
    {first, _} = spawn_monitor(fn -> ask.("one") end)
    await_held(llm, 1)
    assert {429, headers, _} = answer = ask.("one")
    assert {"retry-after", "1"} in headers
    assert {429, "overloaded"} = code(answer)
    spawn(fn -> ask.("other") end)
    await_held(llm, 2)
    assert {429, "overloaded"} = code(ask.("other"))
    Process.exit(first, :kill)
    await_held(llm, 1)

    assert eventually(fn ->
             match?({200, _, "yes"}, complete(core, "answer:200:yes", "ready", with_key("one")))
           end)

    # A place of a stream is given back when it has been read, or left.
    {200, _headers, body} = complete(core, "head:200;chunk:one;hold", "ready", with_key("one"))
    assert {429, "overloaded"} = code(complete(core, "answer:200:yes", "ready", with_key("one")))
    assert Enum.take(body, 1) == ["one"]
    assert {200, _headers, "yes"} = complete(core, "answer:200:yes", "ready", with_key("one"))
  end

  test "what waits to know which adapters there are has a place, and no more time than the request" do
    # Its worker never says which adapters it has.
    llm = start!("ready", enable_lora: true)
    core = core!(models: [llm], max_concurrent_requests: 1)
    asking = spawn_link(fn -> complete(core, "answer:200:yes", "adapter") end)
    assert eventually(fn -> in_flight(llm) == 1 end)
    assert {429, "overloaded"} = core |> complete("answer:200:yes", "another") |> code()
    Process.unlink(asking)
    Process.exit(asking, :kill)

    core = core!(models: [llm], timeout: 50)
    assert {504, "timeout"} = core |> complete("answer:200:yes", "adapter") |> code()
    # For a model that is not named no adapter is looked for.
    core = core!(models: [llm], timeout: :infinity)
    assert {200, _, "yes"} = post(core, "/v1/completions", ~s({"prompt": "answer:200:yes"}))
  end

  test "errors of this library are told as OpenAI's API tells them" do
    llm = start!("ready", max_in_flight: 1, max_queue: 0)
    core = core!(models: [llm])
    assert {400, "prompt_too_long"} = core |> complete("error:prompt_too_long") |> code()
    assert {500, "internal"} = core |> complete("error:internal") |> code()
    refute core |> complete("error:internal") |> elem(2) =~ "fake worker"

    assert {504, "timeout"} =
             [models: [llm], timeout: 50] |> core!() |> complete("hold") |> code()

    ask_in_background(llm, "hold")
    assert eventually(fn -> in_flight(llm) == 1 end)
    assert {429, headers, _body} = answer = complete(core, "answer:200:yes")
    assert {"retry-after", "1"} in headers
    assert {429, "overloaded"} = code(answer)

    assert {503, "not_running"} =
             [models: [{"ready", :nobody}]] |> core!() |> complete("hold") |> code()
  end

  test "a stream that breaks off ends with an event that says so" do
    for {path, event} <- [
          {"/v1/chat/completions",
           ~r/\Adata: {"error": {"code": "engine_dead".*}}\n\ndata: \[DONE\]\n\n\z/},
          {"/v1/messages", ~r/\Aevent: error\ndata: {"error": {.*},"type": "error"}\n\n\z/},
          {"/v1/responses",
           ~r/\Aevent: error\ndata: {"code": "engine_dead",.*"type": "error"}\n\n\z/}
        ] do
      core = core!(models: [start!()])
      {200, _headers, body} = post(core, path, ~s({"prompt": "head:200;chunk:one;kill"}))
      assert ["one", last] = Enum.to_list(body)
      assert last =~ event
    end
  end

  test "an answer that is no stream of events breaks off where it ends early, and gives its place back" do
    core = core!(models: [start!()], max_concurrent_requests: 1)
    steps = "head:200:application/octet-stream;chunk:one;kill"
    {200, [{"content-type", "application/octet-stream"}], body} = complete(core, steps)
    test = self()
    error = assert_raise Error, fn -> Enum.each(body, &send(test, {:piece, &1})) end
    assert error.reason == :engine_dead
    assert_received {:piece, "one"}
    refute_received {:piece, _}
    assert {200, _headers, "yes"} = complete(core, "answer:200:yes")
  end

  test "what is given wrong is refused with its name, and keys are never shown" do
    for {options, option} <- [
          {[models: []], "models"},
          {[models: MyApp.LLM], "models"},
          {[models: [[engine: MyApp.LLM, nme: "a"]]], "nme"},
          {[models: [MyApp.LLM], api_keys: "sk-secret"], "api_keys"},
          {[models: [MyApp.LLM], api_keys: [""]], "api_keys"},
          {[models: [MyApp.LLM], api_keys: [{"sk-secret", max: 1}]], "api_keys"}
        ] do
      {:ok, known} = Options.only(options, Options.openai())
      assert {:error, %Error{reason: :invalid_option} = error} = OpenAI.new(known, nil)
      assert error.details["option"] == option
      refute inspect(error) =~ "sk-secret"
    end
  end
end
