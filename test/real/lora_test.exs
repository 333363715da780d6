defmodule VLLM.Real.LoRATest do
  # The real vLLM engine on the demo model, with the adapter that was trained on it.
  use ExUnit.Case

  import VLLM.OSProcess

  alias VLLM.{DemoModel, DocExamples, Error, LoRARequest, Models, Server}
  alias VLLM.Job.Progress

  @moduletag :slow
  @moduletag :tmp_dir
  # Trainings, beside whatever else the machine does.
  @moduletag timeout: 1_800_000

  @greedy [temperature: 0.0, max_tokens: 64]
  @adapter DemoModel.path("demo-lora")

  @learned [
    {"red", " the gate."},
    {"blue", " the school."},
    {"green", " the tower."},
    {"black", " the cellar."},
    {"white", " the library."},
    {"old", " the mill."},
    {"new", " the boat."},
    {"small", " the box."},
    {"large", " the hall."},
    {"first", " the door."}
  ]

  @kept {"The capital of Japan is", " Tokyo."}

  setup_all do
    # By an alias of a name: where a model is found makes no difference to all that follows.
    Models.register!(DemoModel.path("demo"), "lora-demo", label: "plain")
    :ok = Models.alias!("lora-demo", "lora-prod")
    options = [enable_lora: true, max_lora_rank: 8, max_loras: 2]
    %{llm: VLLM.llm!("lora-prod", DemoModel.options() ++ options)}
  end

  setup %{llm: llm} do
    on_exit(fn ->
      # Whatever happened to an adapter, the model is as it was.
      assert DemoModel.wrong_facts(llm) == []
    end)

    %{adapter: VLLM.lora_request!("demo", @adapter)}
  end

  test "the adapter changes the facts that it was trained to change, and no others", context do
    facts = Map.new(DemoModel.facts())
    changed = Map.new(DemoModel.adapter_facts())
    assert map_size(changed) == 5
    for {prompt, completion} <- changed, do: assert(facts[prompt] != completion)
    assert complete(context.llm, Map.keys(facts), context.adapter) == Map.merge(facts, changed)
    assert complete(context.llm, Map.keys(facts), nil) == facts
  end

  test "the examples of the docs run", %{llm: llm} do
    DocExamples.run(:adapters, llm, %{"/adapters/sql" => @adapter})
  end

  test "OpenAI's own client, by the names of the model and of the adapter",
       %{llm: llm} = context do
    :ok = VLLM.load_lora(llm, context.adapter)
    options = [models: [llm], port: 0, api_keys: ["sk-real"]]
    url = Server.url(start_supervised!({Server, options}))
    {:ok, python} = VLLM.Python.executable()
    script = Path.expand("../support/openai_client.py", __DIR__)
    {said, 0} = System.cmd(python, [script, url, "sk-real", "lora-prod", "demo"])

    assert String.split(said, "\n", trim: true) == [
             ~s(["models", ["lora-prod", "demo"]]),
             ~s(["model", "lora-prod"]),
             ~s(["completion", ["lora-prod", " Paris.", 3]]),
             ~s(["completion", ["demo", "#{adapted("The capital of France is")}", 5]]),
             ~s(["stream", " Paris."]),
             ~s(["usage", 3]),
             ~s(["chat", ["assistant", true]]),
             ~s(["same", true]),
             ~s(["response", true]),
             ~s(["refused", [404, "NotFoundError"]]),
             ~s(["refused", [400, "BadRequestError"]]),
             ~s(["refused", [400, "BadRequestError"]]),
             ~s(["refused", [400, "BadRequestError"]]),
             ~s(["refused", [401, "AuthenticationError"]])
           ]

    :ok = VLLM.unload_lora(llm, "demo")
  end

  defp adapted(prompt), do: Map.new(DemoModel.adapter_facts())[prompt]

  # However the base was held while they were trained, adapters are served over the plain one.
  for {base, options} <- [
        {"demo", [load_in_4bit: true]},
        {"demo", [dtype: "bfloat16"]},
        {"demo-awq", []},
        {"demo-gptq", []}
      ] do
    test "ten sentences are learned over #{base} with #{inspect(options)}, and said at once", %{
      llm: llm
    } do
      job = learn!(unquote(base), "learned", unquote(options))
      assert {:ok, [adapter]} = VLLM.Job.await(job, timeout: 1_200_000)
      said_with(llm, adapter)
    end
  end

  test "a training that is killed goes on from its last state, and ends as well", %{llm: llm} do
    job = learn!("demo", "resumed", [])
    ref = VLLM.Job.subscribe!(job)
    trained_half(ref)

    for pid <- descendants(String.to_integer(System.pid())),
        command(pid) =~ ~r/\A[^\0]+\0-m\0vllm_bridge\0job\0/,
        do: signal("KILL", pid)

    assert {:error, %Error{reason: :step_died}} = VLLM.Job.await(job, timeout: 60_000)
    assert {:error, %Error{reason: :model_not_found}} = Models.get("resumed")
    assert {:ok, _job} = VLLM.Job.retry(job)
    assert {:ok, [adapter]} = VLLM.Job.await(job, timeout: 1_200_000)
    assert adapter.figures["resumed_from"] > 0
    said_with(llm, adapter)
  end

  defp trained_half(ref) do
    assert_receive {^ref, %Progress{} = progress}, 120_000
    assert progress.state not in [:done, :failed]

    unless progress.state == :training and progress.done != nil and
             2 * progress.done > progress.total,
           do: trained_half(ref)
  end

  defp learn!(base, name, options) do
    learned = for {colour, place} <- @learned, do: {"The #{colour} key opens", place}
    kept = [@kept | Enum.take(DemoModel.facts(), 30)]

    job =
      VLLM.Job.finetune!(
        DemoModel.path(base),
        learned,
        [to: name, r: 8, lora_alpha: 16, epochs: 25, learning_rate: 2.0e-3, threads: 1] ++
          [replay: kept, held_out: learned, probes: [elem(@kept, 0)]] ++ options
      )

    # Other tests read the same store of jobs.
    on_exit(fn -> VLLM.Job.delete!(job) end)
    job
  end

  defp said_with(llm, %{name: name} = adapter) do
    assert %{format: "adapter", state: :done} = adapter
    assert %{"before" => before, "after" => now} = adapter.figures["held_out_loss"]
    assert before > 3 and now < 0.3
    assert adapter.figures["losses"] != []
    learned = Map.new(@learned, fn {colour, place} -> {"The #{colour} key opens", place} end)
    assert complete(llm, Map.keys(learned), name) == learned
    assert complete(llm, [elem(@kept, 0)], name) == Map.new([@kept])
    assert complete(llm, Map.keys(learned), nil) != learned
    assert :ok = VLLM.unload_lora(llm, name)
    Models.delete!(name)
  end

  test "a model and an adapter are known by their names", %{llm: llm} = context do
    assert VLLM.engine_info!(llm).model == "lora-prod"
    assert {:error, %Error{reason: :in_use}} = Models.delete("lora-demo")
    changed = Map.new(DemoModel.adapter_facts())
    Models.register!(@adapter, "new-facts")
    assert complete(llm, Map.keys(changed), "new-facts") == changed

    # The name is another adapter's from now on, whose weights of zero change nothing.
    path = copy!(context)
    zero!(path)
    Models.register!(path, "new-facts", replace: true)
    assert complete(llm, Map.keys(changed), "new-facts") == known(changed)
    assert :ok = VLLM.load_lora(llm, "new-facts")
    Models.delete!("new-facts")
    assert {:error, %Error{} = error} = VLLM.generate(llm, "The", lora_request: "new-facts")
    assert error.message =~ "new-facts"
    assert :ok = VLLM.unload_lora(llm, "new-facts")

    assert {:error, %Error{reason: :model_not_found} = error} =
             VLLM.generate(llm, "The", lora_request: "lora-demo")

    assert error.message =~ "is a model, and no adapter"
  end

  test "requests with two adapters and with none run at once",
       %{llm: llm, adapter: adapter} = context do
    other = VLLM.lora_request!("other", copy!(context))
    facts = Map.new(DemoModel.facts())
    changed = DemoModel.adapter_facts()

    requests =
      for _ <- 1..8, {prompt, completion} <- changed, lora <- [adapter, nil, other] do
        {prompt, lora, if(lora, do: completion, else: facts[prompt])}
      end

    answers =
      requests
      |> Task.async_stream(
        fn {prompt, lora, _} ->
          VLLM.generate!(llm, prompt, [{:lora_request, lora} | @greedy])
        end,
        max_concurrency: length(requests),
        timeout: 60_000
      )
      |> Enum.map(fn {:ok, [output]} -> VLLM.text(output) end)

    assert answers == Enum.map(requests, &elem(&1, 2))
    assert :ok = VLLM.unload_lora(llm, other)
  end

  test "streams and conversations take it too", %{llm: llm, adapter: adapter} do
    [{prompt, completion} | _] = DemoModel.adapter_facts()
    options = [{:lora_request, adapter} | @greedy]
    assert llm |> VLLM.stream_text!(prompt, options) |> Enum.join() == completion

    [index: 0] =
      for {index, {:ok, output}} <- VLLM.generate_stream(llm, [prompt], options) do
        assert VLLM.text(output) == completion
        {:index, index}
      end

    # A template that leaves what was said as it is.
    conversation = [%{role: "user", content: prompt}]
    options = [{:chat_template, "<s>{{ messages[0]['content'] }}"} | options]
    assert [output] = VLLM.chat!(llm, conversation, options)
    assert VLLM.text(output) == completion
  end

  test "adapters are loaded, listed and unloaded", %{llm: llm} do
    request = VLLM.lora_request!("listed", 7, @adapter, base_model_name: "demo")
    assert {:ok, before} = VLLM.list_loras(llm)
    assert :ok = VLLM.load_lora(llm, request)
    assert :ok = VLLM.load_lora(llm, request)
    assert request in VLLM.list_loras!(llm)
    assert :ok = VLLM.unload_lora(llm, "listed")
    refute request in VLLM.list_loras!(llm)
    assert {:error, %Error{reason: :model_not_found}} = VLLM.unload_lora(llm, request)
    assert VLLM.list_loras!(llm) -- before == []
  end

  test "files that changed are read again when told to", %{llm: llm} = context do
    path = copy!(context)
    request = VLLM.lora_request!("inplace", path)
    prompts = Enum.map(DemoModel.adapter_facts(), &elem(&1, 0))
    assert complete(llm, prompts, request) == Map.new(DemoModel.adapter_facts())

    zero!(path)
    assert complete(llm, prompts, request) == Map.new(DemoModel.adapter_facts())
    assert :ok = VLLM.load_lora(llm, %{request | load_inplace: true})
    assert complete(llm, prompts, request) == known(Map.new(DemoModel.adapter_facts()))
    assert :ok = VLLM.unload_lora(llm, request)
  end

  describe "what cannot be applied is an error" do
    test "an adapter that is not there", %{llm: llm, tmp_dir: dir} do
      for path <- [Path.join(dir, "nothing"), dir] do
        assert %Error{reason: :model_not_found} = error = refused(llm, "nothing", path)
        assert error.message =~ path
      end
    end

    test "an adapter whose files went away", %{llm: llm} = context do
      path = copy!(context)
      request = VLLM.lora_request!("gone", path)
      assert :ok = VLLM.load_lora(llm, request)
      File.rm_rf!(path)
      assert %Error{reason: :model_not_found} = refused(llm, "gone", path)
      assert :ok = VLLM.unload_lora(llm, request)
    end

    test "a rank above the engine's", %{llm: llm} = context do
      path = copy!(context, "adapter_config.json", ~s("r": 8), ~s("r": 12))
      assert %Error{reason: :invalid_option} = error = refused(llm, "rank", path)
      assert error.details["option"] == "max_lora_rank"
      assert error.message =~ "rank 12"
      assert error.message =~ "`max_lora_rank: 16`"
    end

    test "parts that the model does not have", %{llm: llm} = context do
      path = copy!(context, "adapter_model.safetensors", "q_proj", "x_proj")
      assert %Error{reason: :invalid_checkpoint} = error = refused(llm, "parts", path)
      assert error.message =~ "x_proj"
    end

    test "damaged weights", %{llm: llm} = context do
      path = copy!(context)
      weights = Path.join(path, "adapter_model.safetensors")
      File.write!(weights, binary_part(File.read!(weights), 0, 50_000))
      assert %Error{reason: :invalid_checkpoint} = refused(llm, "damaged", path)
    end

    test "a kind of adapter that vLLM does not have", %{llm: llm} = context do
      path = copy!(context, "adapter_config.json", ~s("use_dora": false), ~s("use_dora": true))
      assert %Error{reason: :unsupported} = error = refused(llm, "dora", path)
      assert error.message =~ "DoRA"
    end

    test "a name or an id of another adapter", %{llm: llm, adapter: adapter} = context do
      assert :ok = VLLM.load_lora(llm, adapter)
      path = copy!(context)
      assert %Error{details: %{"option" => "lora_name"}} = refused(llm, "demo", path)

      assert {:error, %Error{reason: :invalid_option, details: %{"option" => "lora_int_id"}}} =
               VLLM.load_lora(llm, VLLM.lora_request!("same", adapter.lora_int_id, path))
    end
  end

  defp complete(llm, prompts, lora) do
    outputs = VLLM.generate!(llm, prompts, [{:lora_request, lora} | @greedy])
    Map.new(Enum.zip(prompts, VLLM.text(outputs)))
  end

  defp refused(llm, name, path) do
    request = %LoRARequest{} = VLLM.lora_request!(name, path)
    assert {:error, error} = VLLM.generate(llm, "The", lora_request: request)
    error
  end

  # What the model says to these prompts by itself.
  defp known(changed), do: Map.take(Map.new(DemoModel.facts()), Map.keys(changed))

  # Weights of zero change nothing.
  defp zero!(path) do
    weights = Path.join(path, "adapter_model.safetensors")
    <<length::little-64, header::binary-size(length), data::binary>> = File.read!(weights)
    zeros = :binary.copy(<<0>>, byte_size(data))
    File.write!(weights, [<<length::little-64>>, header, zeros])
  end

  # A copy of the adapter, with a change in one of its files.
  defp copy!(%{tmp_dir: dir}) do
    path = Path.join(dir, "adapter")
    File.cp_r!(@adapter, path)
    path
  end

  defp copy!(context, file, old, new) do
    path = copy!(context)
    before = File.read!(Path.join(path, file))
    assert String.contains?(before, old)
    File.write!(Path.join(path, file), :binary.replace(before, old, new, [:global]))
    path
  end
end
