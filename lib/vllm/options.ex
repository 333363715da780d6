defmodule VLLM.Options do
  @moduledoc false
  # The options of this library, each declared once: validation, defaults and
  # the docs of the functions that take them come from here. Options that are
  # not declared belong to vLLM and go to the worker, which asks the installed
  # vLLM about them.

  alias VLLM.{Error, LoRARequest, Secrets, Wire}
  alias VLLM.Bridge.MessagePack

  @typedoc """
  Name, how a value is checked, default, and the text for the docs. A value of the
  type `:wire` goes to the worker, and is in wire terms once it is checked; so is
  one of `:map`. One of the type `:term` is looked at elsewhere, or by nobody.
  """
  @type spec :: {atom(), type(), term(), String.t()}
  @type type ::
          :name
          | :atom
          | :nodes
          | :pos_integer
          | :non_neg_integer
          | :pos_number
          | :non_neg_number
          | :counts
          | :timeout
          | :grace
          | :port
          | :ip
          | :boolean
          | :string
          | :machine
          | :env
          | :devices
          | :distinct_nodes
          | :patterns
          | :notify
          | :texts
          | :lora_request
          | :wire
          | :map
          | :term

  # The longest time in milliseconds that Erlang's timers and receives take.
  @longest 0xFFFF_FFFF

  @engine [
    {:name, :name, nil,
     "what calls may use instead of the handle: an atom, `{:global, term}` or `{:via, module, term}`"},
    {:replicas, :pos_integer, nil,
     "how many workers serve the model; each holds it in full. By default 1, or one for each " <>
       "entry of `devices`"},
    {:devices, :devices, nil,
     "the devices of each replica: `[[0, 1], [2, 3]]` gives the first two to the first one. Numbers " <>
       "or names, as `CUDA_VISIBLE_DEVICES` (or what the platform has in its place) takes them. By " <>
       "default each replica sees all that there are"},
    {:nodes, :distinct_nodes, nil,
     "the nodes of Erlang's distribution that each replica is split over, this one first: " <>
       "`[:\"gpu1@10.0.0.1\", :\"gpu2@10.0.0.2\"]`. Each has an equal share of the processes that " <>
       "`tensor_parallel_size`, `pipeline_parallel_size` and `data_parallel_size` make together. " <>
       "They talk without authentication: see guides/clusters.md"},
    {:env, :env, %{},
     "environment variables of the worker, as a map, or a list of maps, one for each replica; nil " <>
       "unsets one. For vLLM's own switches, such as `%{\"VLLM_LOGGING_LEVEL\" => \"DEBUG\"}`. Values " <>
       "do not show in logs"},
    {:python, :string, nil,
     "path of the Python interpreter that has vLLM; by default the one that `mix vllm.setup` made"},
    {:nursery, :boolean, true,
     "start workers by forking a process that has imported vLLM already, which takes seconds off " <>
       "all starts but the first. It is kept for five minutes after the last engine and holds " <>
       "about half a gigabyte, most of it shared with the workers. Workers with an `env` of their " <>
       "own are started without it"},
    {:allowed_models, :patterns, nil,
     "the only models that may be named, for applications whose users name them: a list of names, " <>
       "of patterns (`\"org/*\"`, `\"/models/*\"`, where `*` stands for anything) and of regular " <>
       "expressions (which fit anywhere in a name: begin them with `\\A` and end them with `\\z`). " <>
       "Anything else is `:not_allowed` before it is looked up. `config :ex_vllm, " <>
       "allowed_models: [...]` holds for every call; a model must be in both where both are given. " <>
       "Paths are compared in full (without `..`), hub names with their `:Q8_0`"},
    {:load_timeout, :timeout, 900_000,
     "milliseconds until a worker must be ready, downloads included"},
    {:max_in_flight, :pos_integer, nil,
     "requests that each worker is given at once; by default the engine's `max_num_seqs`"},
    {:max_queue, :non_neg_integer, 1024,
     "requests that may wait beyond those; then calls end with `:overloaded`"},
    {:max_restarts, :non_neg_integer, 3,
     "restarts of a dead worker within `max_seconds` before the engine gives up"},
    {:max_seconds, :pos_integer, 300, "see `max_restarts`; seconds"},
    {:hang_timeout, :timeout, 120_000,
     "milliseconds that a worker with requests may go without an answer to a ping, or without " <>
       "any progress of its engine; then it is killed and restarted. A long prompt on a slow device " <>
       "is progress. `:infinity` turns this off"},
    {:shutdown_timeout, :grace, 5_000,
     "milliseconds that requests in flight may take to end when the engine is stopped; then they " <>
       "end with `:shutdown`"},
    {:max_frame, :pos_integer, 64 * 1024 * 1024,
     "bytes that one message between Elixir and Python may have"},
    {:max_unsent, :pos_integer, 256 * 1024 * 1024,
     "bytes of requests that may wait for a worker that does not read; then calls end with `:overloaded`"},
    {:telemetry_payloads, :boolean, false,
     "have events of `VLLM.Telemetry` carry prompts and what came of them"},
    {:progress, :boolean, nil,
     "show a line with the progress of loading (`llm/2` only); by default in iex and in mix " <>
       "tasks that have a terminal"}
  ]

  @call [
    {:timeout, :timeout, 300_000,
     "milliseconds until the whole call must have its answer, waiting for a starting engine included; or `:infinity`"}
  ]

  @metrics [
    {:timeout, :timeout, 5_000,
     "milliseconds that replicas may take to answer; those that have not are left out"}
  ]

  @tools [
    {:timeout, :timeout, 120_000,
     "milliseconds until the answer must be there, the start of a Python process and what it asks of " <>
       "the hub included; or `:infinity`"}
  ]

  # Of questions about another machine than this one.
  @machine [
    {:device, :string, nil,
     "the device to answer for, by its name: `\"H100\"`, `\"RTX 4090\"`, `\"2x A10G\"`, `\"24GiB\"` (any of that " <>
       "size), `\"cpu 64GiB\"`. By default those of this machine"},
    {:devices, :machine, nil,
     "several of them, as a list: `[\"24GiB\", \"24GiB\"]`. What an engine takes as its `devices` (`[[0, 1]]`) " <>
       "is about this machine's"}
  ]

  @estimate @machine ++
              [
                {:concurrency, :pos_integer, 1,
                 "how many requests of `max_model_len` tokens are to fit at a time"}
              ]

  # By which Python, and in which environment.
  @where for spec <- @engine, elem(spec, 0) in [:python, :env], do: spec

  @plot @tools ++
          [
            {:format, :wire, nil,
             "what kind of file: `:svg`, which it is by default, `:png` or `:pdf`"}
          ]

  @cached @tools ++
            [
              {:download_dir, :string, nil,
               "the folder that models are downloaded to; by default that of `HF_HOME`"}
            ]

  @delete @cached ++
            [
              {:revision, :string, nil,
               "only this one, a commit, tag or branch; else all of them"}
            ]

  @replace [
    {:replace, :boolean, false, "take the name from another model that has it"}
  ]

  @register @tools ++
              [
                {:label, :string, nil,
                 "tells it from other models of the same name, which are then called `\"name:label\"`"},
                {:base_model, :string, nil,
                 "the model that it was made of, or that an adapter belongs to; by default what its files say"}
              ] ++ @replace

  @alias @tools ++ @replace

  @force [
    {:force, :boolean, false, "delete it although an engine of this BEAM serves it"}
  ]

  @search @tools ++
            [
              {:limit, :pos_integer, 20, "how many models to return at most"},
              {:author, :string, nil, "only models of this user or organization"},
              {:filter, :string, nil,
               "only models with this tag, such as `\"gguf\"` or `\"awq\"`"},
              {:hf_token, :string, nil,
               "access token, to find private models, too; by default that of `HF_TOKEN`"}
            ]

  @pull [
    {:timeout, :timeout, :infinity, "milliseconds until everything must be there"},
    {:stall_timeout, :timeout, 300_000,
     "milliseconds that may pass without anything that comes; then the pull ends with `:timeout`. " <>
       "What has come stays, and the next one goes on from there"},
    {:notify, :notify, nil,
     "a pid that gets `{model, %VLLM.Hub.Progress{}}` a few times a second, or `{pid, ref}` for one " <>
       "that gets `{ref, %VLLM.Hub.Progress{}}`"},
    {:progress, :boolean, nil,
     "show a bar with the progress; by default in iex and in mix tasks that have a terminal"}
  ]

  @push [
    {:private, :boolean, true,
     "whether a repository that is made for it is seen by its owner only; one that is there stays " <>
       "as it is"},
    {:hf_token, :string, nil,
     "access token with the role `write`; by default that of `HF_TOKEN` or of `hf auth login`"},
    {:timeout, :timeout, :infinity, "milliseconds until everything must be uploaded"},
    {:stall_timeout, :timeout, 300_000,
     "milliseconds that may pass without a byte that is read or sent; then the push ends with " <>
       "`:timeout`. The next one does not send again what the hub has"}
    | Enum.drop(@pull, 2)
  ]

  # How the workers of a job are started. What may be secret is in no file of the job.
  @workers [
    {:threads, :pos_integer, nil,
     "how many threads its workers compute with; by default as many as there are cores"},
    {:nice, :non_neg_integer, 10,
     "how far its workers stand back behind other processes, up to 19, as of `nice`: they take what " <>
       "engines leave, and most of the cores where none is busy"},
    {:python, :string, nil,
     "path of the Python interpreter that has vLLM; by default the one that `mix vllm.setup` made"},
    {:quantize_python, :string, nil,
     "path of the one that has what quantizes; by default what `mix vllm.setup --with quantize` made"}
  ]

  @secrets [
    {:hf_token, :string, nil,
     "access token for gated models; by default that of `HF_TOKEN`. It is kept in memory only"},
    {:env, :env, %{},
     "environment variables of its workers, as a map; nil unsets one. They are kept in memory only"}
  ]

  # Which worker says what models can be made in.
  @formats for spec <- @workers ++ @secrets, elem(spec, 0) in [:quantize_python, :env], do: spec

  # Where the model of a job comes from.
  @job_source [
    {:revision, :string, nil, "branch, tag or commit of a hub model"},
    {:subfolder, :string, nil, "folder of a hub model's repository that the model is in"},
    {:download_dir, :string, nil,
     "folder that hub models are downloaded to; by default that of `HF_HOME`"},
    {:allowed_models, :patterns, nil,
     "the only models that may be named: a list of names and patterns, as of an engine"}
  ]

  @quantize [
              {:to, :term, nil,
               "the formats, with options by the names that their libraries have for them, or a word: " <>
                 "`[gguf: [\"Q4_K_M\", \"Q8_0\"], awq: [], gptq: [bits: 4, group_size: 128]]`, or " <>
                 "`[\"gguf:Q4_K_M\", :awq]`. `as:` among the options says what an output is called. " <>
                 "guides/quantizing.md lists what there is"},
              {:name, :string, nil,
               "the outputs are `name:label` then; by default the last part of the model's own name"},
              {:calibration, :term, nil,
               "texts to calibrate with, for formats that are calibrated: a list, or the path of a " <>
                 "text or JSONL file or of a folder with such files. By default a set that ships with " <>
                 "this library"},
              {:max_samples, :pos_integer, nil, "how many of these texts are used at most"},
              {:max_length, :pos_integer, nil, "how many tokens of each are used at most"},
              {:verify, :boolean, true,
               "load each output in an engine and compare it with the source before it counts. " <>
                 "Without it nobody knows whether it loads, nor what was lost"},
              {:texts, :term, nil,
               "what they are compared on: a list of strings; by default a text that ships with this library"}
            ] ++ @job_source ++ @workers ++ @secrets

  @finetune [
              {:to, :string, nil, "the name of the adapter; a merged model is `NAME-merged`"}
            ] ++ @job_source ++ @workers ++ @secrets

  @await [
    {:timeout, :timeout, :infinity,
     "milliseconds until the job must have ended; then it is `:timeout`, and the job goes on"},
    {:progress, :boolean, nil,
     "show a bar with the progress; by default in iex and in mix tasks that have a terminal"}
  ]

  @delete_job [
    {:outputs, :boolean, false, "delete what it has made, too"}
  ]

  @recommend @machine ++
               [
                 {:for, :wire, nil,
                  "what the model is wanted for: `:latency`, `:throughput`, `:quality`, `:memory`, `:fine_tuning` or " <>
                    "`:cpu`. By default `:cpu` where the device is a processor, and `:throughput` elsewhere"},
                 {:search, :boolean, false,
                  "look on the hub for repositories of the same model in these formats"}
               ]

  @compare [
    {:reference, :string, nil,
     "the model that the others are compared with, which they were made of; by default the first"},
    {:texts, :texts, nil,
     "what to measure on: a list of texts that the models have not seen, and were not calibrated with. By " <>
       "default texts that ship with this library: prose in five languages, code and tables"},
    {:max_tokens, :pos_integer, 2048,
     "of how many tokens of the texts the probabilities are measured at most. Figures of a quarter as " <>
       "many are half as sure"},
    {:timeout, :timeout, :infinity, "milliseconds until all is measured"},
    {:progress, :boolean, nil,
     "show a line with the progress; by default in iex and in mix tasks that have a terminal"}
  ]

  # By the names of `vllm bench serve`, where that has them.
  @bench [
    {:against, :term, nil,
     "what an engine is compared with: other options, over those that were given, with a `:model` of their " <>
       "own if that is other, too (`[kv_cache_dtype: \"fp8\"]`, `[replicas: 2]`); or another model alone"},
    {:prompts, :term, nil,
     "your own prompts: a list of strings, of tokens (`%{prompt_token_ids: ids}`) and of conversations, or " <>
       "the path of a `.jsonl`, `.json` or `.txt` file in the forms of guides/finetuning.md. By default " <>
       "random tokens"},
    {:num_prompts, :pos_integer, nil,
     "how many requests a round has; by default 100, or each of `prompts` once. Where there are fewer of " <>
       "these they are asked again"},
    {:random_input_len, :pos_integer, 1024, "tokens of a random prompt"},
    {:random_output_len, :pos_integer, 128, "tokens of the answer to a random prompt"},
    {:random_range_ratio, :non_neg_number, 0,
     "how far both lengths vary, below 1: with 0.5 they are 50 % to 150 % of what was given"},
    {:output_len, :pos_integer, 256, "tokens that the answer to one of `prompts` has at most"},
    {:ignore_eos, :boolean, nil,
     "have answers go on until they have all of these tokens; by default with random prompts only"},
    {:temperature, :non_neg_number, 0, "of sampling"},
    {:max_concurrency, :counts, nil,
     "how many requests are under way at most, or a list of such numbers, each of which is measured. " <>
       "By default there is no limit"},
    {:request_rate, :pos_number, nil,
     "how many requests come in a second, at random times (a Poisson process). By default all come at once"},
    {:burstiness, :pos_number, 1,
     "with a `request_rate`: below 1 requests come in bursts, above 1 at more equal distances"},
    {:seed, :non_neg_integer, 0, "of random prompts, lengths and times"},
    {:rounds, :pos_integer, 3, "how often each is measured, in turns"},
    {:num_warmups, :non_neg_integer, 4,
     "requests to each engine before the first round, which do not count"},
    {:timeout, :timeout, :infinity, "milliseconds until each request must have its answer"},
    {:progress, :boolean, nil,
     "show a line with the progress; by default in iex and in mix tasks that have a terminal"}
  ]

  # What is served over HTTP, whatever stands before it.
  @openai [
    {:models, :term, nil,
     "the engines that are served, as a list: their names or handles, by which clients name the model as " <>
       "the engine was given it (or by its `served_model_name`); `{\"chat\", MyApp.LLM}` for a name of " <>
       "one's own; or a keyword list with `engine:`, `name:`, `tool_call_parser:` (vLLM's name of a parser, " <>
       "which tool calls need unless the client requires one) and `chat_template:` (a template, or the path " <>
       "of one, instead of the model's)"},
    {:api_keys, :term, nil,
     "the keys of which a request must have one (`Authorization: Bearer …` or `x-api-key`), as a list of " <>
       "strings, or of `{key, options}` with `allowed_models:` and `max_concurrent_requests:` of its own, and " <>
       "`admin: true` for one that may use the admin API, too. By default none is asked for"},
    {:allowed_models, :patterns, nil,
     "the only names that clients may give, as a list of names, patterns and regular expressions; by " <>
       "default those of all `models:` and of their adapters"},
    {:max_concurrent_requests, :pos_integer, nil,
     "requests that may be under way at once; others are answered with 429. The engines' own limits " <>
       "(`max_in_flight:` and `max_queue:`) hold as well"},
    {:timeout, :timeout, 300_000,
     "milliseconds until a request must be answered, a stream to its end; or `:infinity`"},
    {:queue_timeout, :timeout, :infinity,
     "milliseconds until vLLM must have begun with a request"},
    {:max_body_bytes, :pos_integer, 4 * 1024 * 1024,
     "bytes that a request may have; larger ones are answered with 413. vLLM reads a body in one go, for " <>
       "seconds where it is large, and computes nothing meanwhile"},
    {:tokenize, :boolean, false, "serve `/tokenize` and `/detokenize`, too"},
    {:metrics, :boolean, true,
     "serve `/metrics`: what `VLLM.Metrics.text/1` tells of all engines of this node, which Prometheus " <>
       "reads. Not to keys that have `allowed_models:` of their own"},
    {:metrics_without_key, :boolean, false, "ask for no key there"}
  ]

  # What a key may have of its own.
  @api_key for(
             spec <- @openai,
             elem(spec, 0) in [:allowed_models, :max_concurrent_requests],
             do: spec
           ) ++ [{:admin, :boolean, false, "use the admin API, too"}]

  # There it would be for whoever may use the models, under the application's own authentication.
  @plug List.keyreplace(
          @openai,
          :metrics,
          0,
          @openai |> List.keyfind(:metrics, 0) |> put_elem(2, false)
        )

  @server [
            {:port, :port, 8000, "where to listen; 0 takes one that is free"},
            {:ip, :ip, {127, 0, 0, 1},
             "the address to listen on, as a tuple or a string; `{0, 0, 0, 0}` is every one of IPv4"},
            {:hosts, :patterns, nil,
             "the names, without port, by which clients may call it (`Host:`), as a list of names, patterns " <>
               "and regular expressions; others are answered with 403. By default all, but where it asks for " <>
               "no keys and listens on this machine only, `localhost` and its addresses: web pages in a " <>
               "browser here could ask it by a name of theirs"},
            {:max_connections, :pos_integer, 4096,
             "clients that may be connected at once; others are answered with 503"},
            {:web, :boolean, false,
             "serve the admin API and its page, too: engines and jobs, to be watched, started and stopped by " <>
               "whoever has a key with `admin: true`; see guides/serving.md. Then `models:` may be left out"}
          ] ++ @openai

  @drain [
    {:timeout, :timeout, :infinity,
     "milliseconds that requests in flight may take to end; then they end with `:shutdown`. Their own " <>
       "deadlines count as well"}
  ]

  @cluster [
    {:name, :atom, nil,
     "the name of the engines, an atom, which is then that of the cluster on this node; it must be given"},
    {:nodes, :nodes, [],
     "nodes that this one connects to, and again when they are lost, as a list of atoms. Without it those " <>
       "count that it is connected to by other means, such as libcluster"},
    {:silent_after, :timeout, 3_000,
     "milliseconds after which an engine's node that has said nothing counts as one that hangs; engines " <>
       "tell of themselves four times a second. `:infinity` turns this off"}
  ]

  @request @call ++
             [
               {:retry, :boolean, false,
                "when the worker dies with the request in flight, run it once more, on another " <>
                  "worker or on the restarted one, within the same `timeout`; a stream only while it " <>
                  "has no delta yet. Such requests run again one at a time, and one that is there when " <>
                  "a worker dies again ends with `:poison`. Over nodes it is run again also where the engine's " <>
                  "node is lost; see guides/clusters.md"},
               {:queue_timeout, :timeout, :infinity,
                "milliseconds until vLLM must have begun with the request, or with one of several " <>
                  "prompts once that is sent; else it ends with `:queue_timeout`. Waiting for a " <>
                  "starting engine counts, the time after it has begun does not"},
               {:session, :term, nil,
                "any term: requests of the same session go to the same one of several replicas, " <>
                  "which has their beginnings in its prefix cache, unless it has more to do than " <>
                  "the others. By default prompts that begin alike go to the same one"}
             ]

  @stream [
    {:inter_token_timeout, :timeout, :infinity,
     "milliseconds that may pass from one delta to the next; then the stream ends with `:timeout` " <>
       "(`details[\"option\"]` says which of the two timeouts it was) and the request is aborted. How long " <>
       "the reader takes does not count"}
  ]

  @lora [
    {:lora_request, :lora_request, nil,
     "the adapter to apply: one from `VLLM.lora_request!/3`, or the name of one, as a job or " <>
       "`VLLM.Models.register/3` gave it; the engine needs `enable_lora: true`"}
  ]

  # How a prompt becomes tokens, and when its turn is.
  @prompt [
    {:tokenization_kwargs, :map, nil,
     "how the prompt becomes tokens, as a keyword list or a map: `truncate_prompt_tokens` (an integer: " <>
       "cut what is longer; -1 cuts to what the model takes, less the one token of an answer), " <>
       "`truncation_side` (`\"left\"` keeps its end, `\"right\"` its beginning; by default the " <>
       "tokenizer's, which vLLM has cut on the left and keep its special tokens), " <>
       "`add_special_tokens` (a boolean); and where texts are pooled `do_lower_case` (a boolean) and " <>
       "`pad_prompt_tokens` (an integer)"},
    {:priority, :wire, nil,
     "an integer, lower is earlier; only for engines with `scheduling_policy: \"priority\"`"}
  ]

  @generate @request ++
              [
                {:sampling_params, :term, nil,
                 "a `VLLM.SamplingParams`, a keyword list or a map; parameters given inline override it"},
                {:schema, :wire, nil,
                 "a JSON schema, as a map or a string, that completions are made to conform to; what " <>
                   "they say is then in `:parsed` too"}
              ] ++ @lora ++ @prompt

  @beam_search @request ++
                 [
                   {:beam_search_params, :term, nil,
                    "a `VLLM.BeamSearchParams`, a keyword list or a map; parameters given inline override it"}
                 ] ++ @lora

  @pool @request ++
          [
            {:pooling_params, :term, nil,
             "a `VLLM.PoolingParams`, a keyword list or a map; parameters given inline override it"}
          ] ++ @prompt

  @encode @pool ++
            [
              {:pooling_task, :string, nil,
               "`\"embed\"`, `\"classify\"`, `\"token_embed\"` or `\"token_classify\"`, as an assertion; by default the engine's"}
            ]

  @score @pool ++
           [
             {:chat_template, :string, nil,
              "a Jinja template that makes one prompt of a `query` and a `document` message, for cross-encoders that need one"}
           ]

  @rerank @score ++
            [{:top_n, :pos_integer, nil, "how many documents to return; by default all of them"}]

  @tokenize @call ++
              [
                {:add_special_tokens, :boolean, true,
                 "add what the model expects around a prompt, such as its beginning-of-text token"}
              ]

  @detokenize @call ++
                [{:skip_special_tokens, :boolean, true, "leave special tokens out of the text"}]

  @sleep @call ++
           [
             {:level, :pos_integer, 1,
              "1 keeps the weights in the machine's memory, 2 drops them; both drop the KV cache"}
           ]

  @lora_request [
    {:lora_int_id, :pos_integer, nil,
     "vLLM's number for the adapter, below 2^31; by default one made of name and path, always the same"},
    {:base_model_name, :string, nil, "the model that the adapter was made for"},
    {:load_inplace, :boolean, false,
     "read the files again although an adapter of this name is loaded, which it replaces: what " <>
       "to give once after they changed"},
    {:is_3d_lora_weight, :boolean, false,
     "the experts' weights are fused; only for engines with `enable_mixed_moe_lora_format: true`"}
  ]

  @template [
    {:chat_template, :string, nil,
     "a Jinja template to use instead of the model's. It is a program: take it from whom you trust"},
    {:chat_template_kwargs, :map, nil,
     "variables of the template, as a map, such as `%{enable_thinking: false}`"},
    {:add_generation_prompt, :boolean, nil,
     "end the prompt with the beginning of the model's answer; by default true, and false with " <>
       "`continue_final_message`"},
    {:continue_final_message, :boolean, false,
     "leave the last message open, for the model to go on with it"},
    {:tools, :wire, nil, "functions that the model may call: a list of maps in OpenAI's shape"}
  ]

  @answer [
    {:tool_choice, :wire, nil,
     "`\"auto\"`, `\"none\"`, `\"required\"` (the answer is a call), or the one function to call: " <>
       "`%{type: \"function\", function: %{name: \"…\"}}`. By default `\"auto\"` with `tools`"},
    {:tool_call_parser, :string, nil,
     "vLLM's parser of the model's tool calls: `\"hermes\"`, `\"llama3_json\"`, `\"mistral\"`, …; " <>
       "without one they stay text"},
    {:reasoning_parser, :string, nil,
     "vLLM's parser of the model's reasoning: `\"deepseek_r1\"`, `\"qwen3\"`, …; by default the " <>
       "engine option of this name"}
  ]

  # The engine arguments of vLLM that most users meet. Only their docs are
  # here; whether a name and a value are right is vLLM's to say.
  @engine_arguments [
    {:quantization, "string", "the checkpoint's own",
     "the quantization method: `\"awq\"`, `\"gptq\"`, `\"compressed-tensors\"`, `\"fp8\"`, `\"bitsandbytes\"`, `\"torchao\"`, `\"hqq\"`, … in any case, also by other usual names (`:bnb`, `\"autoawq\"`). " <>
       "For a quantized checkpoint it is an assertion: another method than the checkpoint's is an error, and the kernel is the one that vLLM chooses without it. " <>
       "A plain model is quantized while it is loaded, by the methods that can. What does not run on this device, or would do nothing to this model, is refused before weights are read, with what does (`mix vllm.doctor` lists it). " <>
       "FP8 weights are dequantized while they are loaded on CPUs whose vLLM has no kernel for them, which saves disk and no memory"},
    {:dtype, "string", "`\"auto\"`",
     "of weights and activations: `\"bfloat16\"`, `\"float16\"`, `\"float32\"`. `\"int8\"` and `\"int4\"` quantize " <>
       "the weights of a plain model while it is loaded (with torchao and with bitsandbytes: " <>
       "`mix vllm.setup --with torchao,bitsandbytes`); activations stay as with `\"auto\"`, and " <>
       "`VLLM.engine_info/2` says in `:quantization_note` what was done"},
    {:quantization_config, "string or map", "torchao's `\"Int8WeightOnlyConfig\"`",
     "with `quantization: \"torchao\"` and a plain model: how to quantize, as the name of one of torchao's " <>
       "configs, or a map of that name (`type`) and its arguments: " <>
       "`%{type: \"Int4WeightOnlyConfig\", group_size: 64}`. With `quantization: \"hqq\"` HQQ's `nbits`, `group_size` and `axis`, " <>
       "whose defaults are hqq's: `%{nbits: 4, group_size: 64, axis: 1}`. On CPUs `%{activations: \"int8\"}` has activations rounded " <>
       "to 8 bits in products with AWQ, GPTQ, auto-round and compressed-tensors W2A16, W4A16 and W8A16, which makes those of several tokens " <>
       "two to three times as fast, and `%{activations: \"exact\"}`, their default, has them as they are; with a GGUF file `\"int8\"` is the default. Else vLLM's own settings of its online methods"},
    {:isq, "string", "none",
     "quantize a plain model in place, at its first start, to one of Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q8_1, Q2_K, Q3_K, Q4_K, Q5_K, " <>
       "Q6_K, Q8_K (GGUF, by llama.cpp), HQQ4 and HQQ8 (HQQ). Later starts load what the first has made. " <>
       "Needs `mix vllm.setup --with quantize`; see guides/quantizing.md"},
    {:isq_cache, "boolean", "true with `isq`",
     "keep what `isq` has made for later starts; with `dtype: \"int4\"` or `\"int8\"` true has these " <>
       "made once and kept, too"},
    {:kv_cache_dtype, "string", "`\"auto\"`, the model's",
     "of the KV cache: `\"fp8\"` halves it, at a small loss. Only what the attention backend has for this model on this device; any other value is an error with the list"},
    {:max_model_len, "integer", "the model's",
     "tokens that prompt and completion may have together"},
    {:tensor_parallel_size, "integer", "1", "devices that each layer is split over"},
    {:pipeline_parallel_size, "integer", "1", "devices that the layers are dealt out to"},
    {:distributed_executor_backend, "string", "`\"uni\"` on up to 4 CPU cores, else vLLM's",
     "what runs the model: `\"uni\"` the process of the engine core, `\"mp\"` a process for each device, which wait for each other by spinning; " <>
       "fewer are faster where cores are few"},
    {:gpu_memory_utilization, "float, 0 to 1", "vLLM's",
     "share of the device's memory that the engine takes"},
    {:kv_cache_memory_bytes, "integer", "what is left",
     "size of the KV cache; skips measuring at start"},
    {:max_num_seqs, "integer", "vLLM's", "requests that are computed together"},
    {:enforce_eager, "boolean", "false",
     "no graph capture and no compilation: starts sooner, runs slower"},
    {:enable_prefix_caching, "boolean", "true",
     "keep the KV cache of prompts that share their beginning"},
    {:enable_prompt_embeds, "boolean", "false",
     "take prompts as embeddings: `%{prompt_embeds: data, shape: {tokens, hidden_size}}`"},
    {:tokenizer, "string", "the model", "folder or hub id of another tokenizer"},
    {:revision, "string", "the default branch", "branch, tag or commit of a hub model"},
    {:subfolder, "string", "the top", "folder of a hub model's repository that the model is in"},
    {:download_dir, "string", "that of `HF_HOME`", "folder that hub models are downloaded to"},
    {:runner, "string", "`\"auto\"`",
     "`\"generate\"`, or `\"pooling\"` for `VLLM.embed/3` and its kin; by default what the model is made for"},
    {:convert, "string", "`\"auto\"`",
     "`\"embed\"` or `\"classify\"`: what to make of a model that generates, with the pooling runner"},
    {:pooler_config, "map", "the model's",
     "how the pooling runner pools: `%{task: \"token_embed\"}`, `%{pooling_type: \"MEAN\"}`, …"},
    {:enable_lora, "boolean", "false",
     "take LoRA adapters with requests: `VLLM.lora_request!/3`"},
    {:max_lora_rank, "integer", "16", "of the adapters: 1, 8, 16, 32, 64, 128, 256, 320 or 512"},
    {:max_loras, "integer", "1", "adapters that are computed together"},
    {:max_cpu_loras, "integer", "`max_loras`",
     "adapters that are kept in memory; others are read again when they are needed"},
    {:trust_remote_code, "boolean", "false",
     "run Python code that comes with the model. It can do whatever you can: only for models whose code you have read"},
    {:hf_token, "string", "`HF_TOKEN`",
     "access token for gated models; does not show in logs or errors"},
    {:seed, "integer", "0", "of sampling, where a request has none"}
  ]

  @spec engine() :: [spec()]
  def engine, do: @engine

  @spec call() :: [spec()]
  def call, do: @call

  @doc "What `VLLM.Metrics.text/1` takes."
  @spec metrics() :: [spec()]
  def metrics, do: @metrics

  @doc "What all questions take that are answered without an engine."
  @spec tools() :: [spec()]
  def tools, do: @tools

  @doc "What questions take that can be asked about another machine."
  @spec machine() :: [spec()]
  def machine, do: @machine

  @doc "What `VLLM.Quantization.estimate/2` takes beside options of an engine."
  @spec estimate() :: [spec()]
  def estimate, do: @estimate

  @doc "By which Python, and in which environment, as of an engine."
  @spec where() :: [spec()]
  def where, do: @where

  @doc "What drawing a picture takes."
  @spec plot() :: [spec()]
  def plot, do: @plot

  @doc "What is asked about the models on this machine."
  @spec cached() :: [spec()]
  def cached, do: @cached

  @doc "What `search` takes."
  @spec search() :: [spec()]
  def search, do: @search

  @doc "What `delete` takes."
  @spec delete() :: [spec()]
  def delete, do: @delete

  @doc "What `VLLM.Models.register/3` takes."
  @spec register() :: [spec()]
  def register, do: @register

  @doc "What `VLLM.Models.alias/3` takes."
  @spec alias() :: [spec()]
  def alias, do: @alias

  @doc "What says that a model may be deleted that is in use."
  @spec force() :: [spec()]
  def force, do: @force

  @doc "What `VLLM.Models.push/3` takes."
  @spec push() :: [spec()]
  def push, do: @push

  @doc "What `VLLM.Models.delete/2` takes."
  @spec unregister() :: [spec()]
  def unregister, do: @cached ++ @force

  @doc "What `pull` takes beside the options of an engine."
  @spec pull() :: [spec()]
  def pull, do: @pull

  @doc "What `VLLM.Quantization.compare/2` takes beside options of an engine."
  @spec compare() :: [spec()]
  def compare, do: @compare

  @doc "What `VLLM.Bench.run/2` takes beside options of an engine."
  @spec bench() :: [spec()]
  def bench, do: @bench

  @doc "What `VLLM.Quantization.recommend/2` takes beside options of an engine."
  @spec recommend() :: [spec()]
  def recommend, do: @recommend

  @doc "What a job takes that quantizes a model."
  @spec quantize() :: [spec()]
  def quantize, do: @quantize

  @doc "What a question about the formats of jobs takes."
  @spec formats() :: [spec()]
  def formats, do: @formats

  @doc "What a job takes that trains an adapter, beside options of the training."
  @spec finetune() :: [spec()]
  def finetune, do: @finetune

  @doc "How the workers of a job are started."
  @spec workers() :: [spec()]
  def workers, do: @workers

  @doc "What a job is not given from the disk when it is tried again."
  @spec retry() :: [spec()]
  def retry, do: @secrets

  @doc "What waiting for a job takes."
  @spec await() :: [spec()]
  def await, do: @await

  @doc "What deleting a job takes."
  @spec delete_job() :: [spec()]
  def delete_job, do: @delete_job

  @doc "What serving takes over HTTP, whatever the server is."
  @spec openai() :: [spec()]
  def openai, do: @openai

  @doc "What `VLLM.Plug` takes."
  @spec plug() :: [spec()]
  def plug, do: @plug

  @doc "What `VLLM.Server` takes."
  @spec server() :: [spec()]
  def server, do: @server

  @doc "What a key of such a server takes."
  @spec api_key() :: [spec()]
  def api_key, do: @api_key

  @doc "What `VLLM.Cluster` takes."
  @spec cluster() :: [spec()]
  def cluster, do: @cluster

  @doc "How long replicas that are to end or begin anew are given."
  @spec drain() :: [spec()]
  def drain, do: @drain

  @doc "What only streams of deltas take."
  @spec stream() :: [spec()]
  def stream, do: @stream

  @spec generate() :: [spec()]
  def generate, do: @generate

  @spec chat() :: [spec()]
  def chat, do: @generate ++ @template ++ @answer

  @spec apply_chat_template() :: [spec()]
  def apply_chat_template, do: @call ++ @template

  @spec beam_search() :: [spec()]
  def beam_search, do: @beam_search

  @doc "What `embed` and `classify` take."
  @spec pool() :: [spec()]
  def pool, do: @pool

  @spec encode() :: [spec()]
  def encode, do: @encode

  @spec score() :: [spec()]
  def score, do: @score

  @spec rerank() :: [spec()]
  def rerank, do: @rerank

  @spec tokenize() :: [spec()]
  def tokenize, do: @tokenize

  @spec detokenize() :: [spec()]
  def detokenize, do: @detokenize

  @spec sleep() :: [spec()]
  def sleep, do: @sleep

  @spec lora_request() :: [spec()]
  def lora_request, do: @lora_request

  @doc "What says how a conversation becomes a prompt, of `chat` and of `apply_chat_template`."
  @spec template() :: [spec()]
  def template, do: @template

  @doc "What only `chat` takes."
  @spec answer() :: [spec()]
  def answer, do: @answer

  @spec engine_arguments() :: [{atom(), String.t(), String.t(), String.t()}]
  def engine_arguments, do: @engine_arguments

  @doc """
  Takes the declared options out of what a user gave, checked and with their
  defaults; what is left has string keys and the values as they are.
  """
  @spec split(keyword() | map(), [spec()]) ::
          {:ok, %{atom() => term()}, %{String.t() => term()}} | {:error, Error.t()}
  def split(given, specs) do
    with {:ok, given} <- to_map(given) do
      Enum.reduce_while(specs, {:ok, %{}, given}, fn {name, type, default, _doc},
                                                     {:ok, known, rest} ->
        {value, rest} = Map.pop(rest, Atom.to_string(name), default)

        case check(type, name, value, default) do
          {:ok, value} -> {:cont, {:ok, Map.put(known, name, value), rest}}
          {:error, error} -> {:halt, {:error, error}}
        end
      end)
    end
  end

  @doc "Like `split/2`, where nothing but the declared options is known."
  @spec only(keyword() | map(), [spec()]) :: {:ok, %{atom() => term()}} | {:error, Error.t()}
  def only(given, specs) do
    with {:ok, known, rest} <- split(given, specs) do
      case Map.keys(rest) do
        [] -> {:ok, known}
        [name | _] -> {:error, unknown(name, names(specs))}
      end
    end
  end

  @doc "The names of declared options."
  @spec names([spec()]) :: [atom()]
  def names(specs), do: Enum.map(specs, &elem(&1, 0))

  @doc "Options in wire terms; one that cannot be sent is an error that says which, and where in it."
  @spec to_wire(%{String.t() => term()}) :: {:ok, %{String.t() => term()}} | {:error, Error.t()}
  def to_wire(options) do
    Enum.reduce_while(options, {:ok, options}, fn {name, value}, {:ok, wire} ->
      case check(:wire, name, value) do
        {:ok, value} -> {:cont, {:ok, %{wire | name => value}}}
        {:error, error} -> {:halt, {:error, error}}
      end
    end)
  end

  @doc "Checks a time that is an argument of its own: milliseconds, from 0, or `:infinity`."
  @spec check_timeout(term()) :: :ok | {:error, Error.t()}
  def check_timeout(0), do: :ok
  def check_timeout(time), do: with({:ok, _time} <- check(:timeout, :timeout, time), do: :ok)

  @doc "The error for an option that nobody knows, with the nearest of `names`."
  @spec unknown(String.t(), [atom() | String.t()]) :: Error.t()
  def unknown(name, names) do
    message = "Unknown option `#{name}`."

    case nearest(name, names) do
      nil ->
        Error.new(:invalid_option, message, %{"option" => name})

      near ->
        remedy = "Did you mean `#{near}`?"
        details = %{"option" => name, "nearest" => near, "remedy" => remedy}
        Error.new(:invalid_option, "#{message} #{remedy}", details)
    end
  end

  @doc """
  The worker's error for an option that vLLM does not know, which may have been
  meant for this library: then with our nearest name instead of vLLM's. `specs`
  are what the function takes beside the options of an engine.
  """
  @spec or_ours(Error.t(), [spec()]) :: Error.t()
  def or_ours(error, specs \\ [])

  def or_ours(
        %Error{reason: :invalid_option, details: %{"option" => name, "nearest" => theirs}} =
          error,
        specs
      )
      when not is_map_key(error.details, "allowed") do
    ours = nearest(name, names(specs ++ @engine))
    # What is named may be right, and its value unknown.
    if ours not in [nil, name] and ours == nearest(name, [ours, theirs || ""]),
      do: unknown(name, [ours]),
      else: error
  end

  def or_ours(error, _specs), do: error

  @doc "The name nearest to `name`, if one is near."
  @spec nearest(String.t(), [atom() | String.t()]) :: String.t() | nil
  def nearest(name, names) do
    names
    |> Enum.map(&to_string/1)
    |> Enum.map(&{String.jaro_distance(name, &1), &1})
    |> Enum.filter(fn {distance, _} -> distance > 0.8 end)
    |> Enum.max(fn -> {0, nil} end)
    |> elem(1)
  end

  # Nil is "not given", where that is the default.
  defp check(_type, _name, nil, nil), do: {:ok, nil}
  defp check(type, name, value, _default), do: check(type, name, value)

  @doc "The value of an option, as its type has it; for values that are arguments of their own, too."
  @spec check(type(), atom() | String.t(), term()) :: {:ok, term()} | {:error, Error.t()}
  def check(type, name, value)

  def check(:wire, name, value) do
    with {:error, {_what, path} = fault} <- Wire.encode(value) do
      name = to_string(name)

      {:error,
       Error.new(
         :invalid_option,
         "`#{name}` #{Wire.describe(fault)}. What vLLM is given is made of maps, lists, " <>
           "strings, atoms, numbers, booleans and nil.",
         %{"option" => name, "path" => [name | path]}
       )}
    end
  end

  def check(:map, name, value) do
    case check(:wire, name, value) do
      {:ok, wire} when wire == [] -> {:ok, %{}}
      {:ok, wire} when is_map(wire) -> {:ok, wire}
      {:ok, _other} -> wrong(name, :map, value)
      error -> error
    end
  end

  # Of several variables of a name the first counts, as of options.
  def check(:env, name, value) do
    if valid?(:env, value), do: {:ok, environment(value)}, else: wrong(name, :env, value)
  end

  def check(:lora_request, name, value) do
    cond do
      is_struct(value, LoRARequest) -> check(:wire, name, value)
      valid?(:string, value) -> check(:wire, name, LoRARequest.new(value, expand(value)))
      true -> wrong(name, :lora_request, value)
    end
  end

  def check(:ip, name, value) when is_binary(value) do
    case :inet.parse_address(to_charlist(value)) do
      {:ok, address} -> {:ok, address}
      {:error, :einval} -> wrong(name, :ip, value)
    end
  end

  def check(type, name, value) do
    if valid?(type, value), do: {:ok, value}, else: wrong(name, type, value)
  end

  defp wrong(name, type, value) do
    shown = if type == :env, do: "something else", else: Secrets.inspect(value)

    {:error,
     Error.new(
       :invalid_option,
       "`#{name}` must be #{expected(type)}; got #{shown}.",
       %{"option" => to_string(name)}
     )}
  end

  defp valid?(:name, {:global, _name}), do: true

  defp valid?(:name, {:via, module, _name}) when is_atom(module),
    do: Code.ensure_loaded?(module) and function_exported?(module, :register_name, 2)

  defp valid?(:name, name), do: is_atom(name) and name not in [true, false, :undefined]
  defp valid?(:atom, value), do: is_atom(value) and value not in [true, false, nil]
  defp valid?(:nodes, nodes), do: is_list(nodes) and all?(nodes, &valid?(:atom, &1))

  defp valid?(:distinct_nodes, nodes),
    do: nodes != [] and valid?(:nodes, nodes) and Enum.uniq(nodes) == nodes

  defp valid?(:pos_integer, value), do: is_integer(value) and value > 0
  defp valid?(:non_neg_integer, value), do: is_integer(value) and value >= 0
  defp valid?(:pos_number, value), do: is_number(value) and value > 0
  defp valid?(:non_neg_number, value), do: is_number(value) and value >= 0

  defp valid?(:counts, [_ | _] = counts), do: all?(counts, &valid?(:pos_integer, &1))
  defp valid?(:counts, count), do: valid?(:pos_integer, count)

  defp valid?(:timeout, value), do: value == :infinity or (valid?(:grace, value) and value > 0)
  defp valid?(:grace, value), do: is_integer(value) and value in 0..@longest
  defp valid?(:port, value), do: is_integer(value) and value in 0..65_535
  defp valid?(:ip, value), do: :inet.ntoa(value) != {:error, :einval}
  defp valid?(:boolean, value), do: is_boolean(value)
  defp valid?(:string, value), do: is_binary(value) and value != "" and MessagePack.text?(value)

  defp valid?(:machine, [name | _] = names) when is_binary(name),
    do: all?(names, &valid?(:string, &1))

  defp valid?(:machine, value), do: valid?(:devices, value)

  defp valid?(:env, [first | _] = envs) when is_map(first) or is_list(first),
    do: all?(envs, &env?/1)

  defp valid?(:env, env), do: env?(env)

  defp valid?(:devices, [_ | _] = replicas), do: all?(replicas, &devices?/1)
  defp valid?(:devices, _value), do: false
  defp valid?(:patterns, [_ | _] = patterns), do: all?(patterns, &pattern?/1)
  defp valid?(:patterns, patterns), do: patterns == []

  defp valid?(:texts, [_ | _] = texts), do: all?(texts, &valid?(:string, &1))
  defp valid?(:texts, _value), do: false

  defp valid?(:notify, {pid, _ref}), do: is_pid(pid)
  defp valid?(:notify, pid), do: is_pid(pid)

  defp valid?(:term, _value), do: true

  defp env?(env) when is_map(env) and not is_struct(env) do
    Enum.all?(env, fn {name, value} -> variable?(name) and variable_value?(value) end) and
      map_size(environment(env)) == map_size(env)
  end

  defp env?(env), do: Keyword.keyword?(env) and env |> Map.new() |> env?()

  # What the operating system takes for a name, and for a value.
  defp variable?(name) when is_atom(name), do: name |> Atom.to_string() |> variable?()
  defp variable?(""), do: false
  defp variable?(name), do: is_binary(name) and text_without?(name, ["=", "\0"])

  defp variable_value?(value) when is_atom(value) or is_number(value), do: true
  defp variable_value?(value), do: is_binary(value) and text_without?(value, ["\0"])

  defp text_without?(text, characters),
    do: MessagePack.text?(text) and not String.contains?(text, characters)

  defp environment([first | _] = envs) when is_map(first) or is_list(first),
    do: Enum.map(envs, &environment/1)

  defp environment(env) when is_list(env), do: env |> Enum.reverse() |> Map.new() |> environment()
  defp environment(env), do: Map.new(env, fn {name, value} -> {to_string(name), value} end)

  defp devices?([_ | _] = devices),
    do: all?(devices, &((is_integer(&1) and &1 >= 0) or device_name?(&1)))

  defp devices?(_), do: false

  # `Enum.all?/2`, also for what ends in something else than a list.
  defp all?([head | tail], check?), do: check?.(head) and all?(tail, check?)
  defp all?(tail, _check?), do: tail == []

  defp pattern?(%Regex{}), do: true
  defp pattern?(pattern), do: valid?(:string, pattern)

  defp device_name?(name), do: is_binary(name) and name =~ ~r/\A[\w.:-]+\z/

  defp expected(:name),
    do: "an atom, `{:global, term}` or `{:via, module, term}` with a module that registers names"

  defp expected(:atom), do: "an atom"
  defp expected(:nodes), do: "a list of names of nodes, as atoms"
  defp expected(:distinct_nodes), do: "a list of names of nodes, as atoms, each once"
  defp expected(:pos_integer), do: "a positive integer"
  defp expected(:non_neg_integer), do: "an integer of at least 0"

  defp expected(:pos_number), do: "a number greater than 0"
  defp expected(:non_neg_number), do: "a number of at least 0"
  defp expected(:counts), do: "a positive integer or a list of such"

  defp expected(:timeout),
    do: "a positive number of milliseconds, up to #{@longest}, or `:infinity`"

  defp expected(:grace), do: "a number of milliseconds from 0 to #{@longest}"
  defp expected(:port), do: "a number from 0 to 65535"
  defp expected(:ip), do: "an address, such as `{127, 0, 0, 1}` or `\"127.0.0.1\"`"
  defp expected(:boolean), do: "true or false"
  defp expected(:string), do: "a string of valid UTF-8 that is not empty"
  defp expected(:machine), do: "a list of names of devices, or one of lists as an engine takes it"

  defp expected(:env),
    do: "a map from names (each once) to strings of valid UTF-8, or a list of such maps"

  defp expected(:devices), do: "a list of lists of devices, one for each replica"
  defp expected(:patterns), do: "a list of strings and regular expressions"
  defp expected(:texts), do: "a list of strings of valid UTF-8 that are not empty"
  defp expected(:notify), do: "a pid or `{pid, ref}`"
  defp expected(:map), do: "a keyword list or a map"
  defp expected(:lora_request), do: "an adapter from `VLLM.lora_request!/3`, or the name of one"

  @doc """
  The path of a model or an adapter; a hub id as it is. The worker may have
  another working folder.
  """
  @spec expand(String.t()) :: String.t()
  def expand(path) do
    if String.starts_with?(path, [".", "~"]) or File.exists?(path),
      do: Path.expand(path),
      else: path
  end

  @doc """
  Options from a keyword list or a map as a map with string keys, with the values as
  they are. Where a keyword list has a name twice, the first counts, as in
  `Keyword.get/2`. `name` is the option that they are given as, if they are.
  """
  @spec to_map(term(), String.t() | nil) :: {:ok, %{String.t() => term()}} | {:error, Error.t()}
  def to_map(given, name \\ nil) do
    cond do
      Keyword.keyword?(given) ->
        {:ok,
         for({name, value} <- Enum.reverse(given), into: %{}, do: {Atom.to_string(name), value})}

      is_map(given) and not is_struct(given) ->
        Enum.reduce_while(given, {:ok, %{}}, &put_named(&1, &2, name))

      true ->
        not_options(kind(given), name)
    end
  end

  defp put_named({key, value}, {:ok, map}, option) do
    cond do
      not (is_atom(key) or (is_binary(key) and MessagePack.text?(key))) ->
        {:halt, not_options("a map with other keys", option)}

      is_map_key(map, to_name(key)) ->
        name = to_name(key)

        {:halt,
         {:error,
          Error.new(
            :invalid_option,
            "`#{name}` is given twice, as an atom and as a string; give it once.",
            %{"option" => name}
          )}}

      true ->
        {:cont, {:ok, Map.put(map, to_name(key), value)}}
    end
  end

  defp to_name(key) when is_atom(key), do: Atom.to_string(key)
  defp to_name(key), do: key

  # What came is not shown, for it may be secret.
  defp not_options(what, option) do
    {subject, details} =
      if option, do: {"`#{option}` is", %{"option" => option}}, else: {"Options are", %{}}

    {:error,
     Error.new(
       :invalid_option,
       "#{subject} a keyword list or a map with atoms or strings as keys; got #{what}.",
       details
     )}
  end

  defp kind(%module{}), do: "a struct (`#{inspect(module)}`)"
  defp kind(list) when is_list(list), do: "another list"
  defp kind(nil), do: "nil"
  defp kind(_other), do: "something else"

  @doc "The declared options as a list for the docs."
  @spec docs([spec()]) :: String.t()
  def docs(specs) do
    Enum.map_join(specs, "\n", fn {name, _type, default, doc} ->
      shown = if default in [nil, %{}], do: "", else: " Default: `#{inspect(default)}`."
      "  * `:#{name}` - #{doc}.#{shown}"
    end)
  end

  @doc "vLLM's usual engine arguments as a table for the docs."
  @spec engine_argument_docs() :: String.t()
  def engine_argument_docs do
    rows =
      Enum.map_join(@engine_arguments, "\n", fn {name, type, default, doc} ->
        "| `#{name}` | #{type} | #{default} | #{doc} |"
      end)

    "| argument | type | default | meaning |\n| --- | --- | --- | --- |\n" <> rows
  end
end
